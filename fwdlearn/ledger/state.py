"""Everything that a trainer holds after a step, taken out and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fwdlearn.engine import Choice
from fwdlearn.engine.ladder import Engine
from fwdlearn.ledger.trees import pack, unpack
from fwdlearn.progress import Progress

if TYPE_CHECKING:
    from fwdlearn.trainer import Trainer


@dataclass(frozen=True)
class State:
    """As a snapshot stores it.

    Args:
        meta: JSON values.
        tensors: name -> tensor.
    """

    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def held(trainer: Trainer, at: Progress) -> State:
    """What the trainer holds; its tensors are not copied.

    Raises:
        TypeError: a state has something that is neither tensors nor plain values.
    """
    model, schedule = trainer.model, trainer.schedule
    kept = {
        # What is not trained is what it was at the start.
        "weights": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
        "buffers": dict(model.named_buffers()),
        "optimizer": trainer.optimizer.state_dict(),
        # Which tensors its numbers stand for: modules may be registered in another order.
        "order": _order(trainer),
        "schedule": getattr(schedule, "state_dict", lambda: None)(),
        "rungs": {name: (choice.rung, choice.reason) for name, choice in _rungs(trainer).items()},
        "halvings": trainer.engine.room.halvings,
        "evaluation_halvings": trainer.evaluation_room.halvings,
        "at": at,
    }
    tensors: dict[str, Tensor] = {}
    tree = {name: pack(value, tensors, name) for name, value in kept.items()}
    moved = [name for name, value in tensors.items() if value.device.type != "cpu"]
    return State({"step": at.step, "tree": tree, "moved": moved}, tensors)


@torch.no_grad()
def put_back(state: State, trainer: Trainer) -> Progress:
    """Makes the trainer what it was; returns where the run was."""
    moved = set(state.meta["moved"])
    tensors = {
        name: value.to(trainer.device) if name in moved else value
        for name, value in state.tensors.items()
    }
    tree = unpacked(state, tensors, trainer)
    own = dict(trainer.model.named_parameters()) | dict(trainer.model.named_buffers())
    with torch.inference_mode():
        for name, value in (tree["weights"] | tree["buffers"]).items():
            own[name].copy_(value)
    saved = tree["optimizer"]
    if "order" in tree:
        saved = _numbered(saved, tree["order"], _order(trainer))
    _load(trainer.optimizer, saved)
    if tree["schedule"] is not None:
        trainer.schedule.load_state_dict(tree["schedule"])  # type: ignore[union-attr]
    for name, choice in _rungs(trainer).items():
        rung, reason = tree["rungs"].get(name, (choice.rung, choice.reason))
        if rung != choice.rung:
            holder = trainer.engine if name == "losses" else trainer.engine.exact  # type: ignore[union-attr]
            holder.choice = Choice(rung, reason)
    for name, room in (
        ("halvings", trainer.engine.room),
        ("evaluation_halvings", trainer.evaluation_room),
    ):
        room.halvings = max(room.halvings, tree.get(name, 0))
    at = tree["at"]
    assert isinstance(at, Progress)
    return at


def unpacked(state: State, tensors: Mapping[str, Tensor], trainer: Trainer) -> dict[str, Any]:
    """The parts of a state; its dataclasses are ours, or of where estimator and allocator are.

    Raises:
        ValueError: there is another.
    """
    parts = (Progress, type(trainer.estimator), type(trainer.allocator))
    packages = {part.__module__.partition(".")[0] for part in parts}
    return {k: unpack(v, tensors, packages) for k, v in state.meta["tree"].items()}


def _rungs(trainer: Trainer) -> dict[str, Choice]:
    """What the engine has settled on so far."""
    engine = trainer.engine
    found = {} if engine.choice is None else {"losses": engine.choice}
    # Looking at what has not been asked for would make it.
    exact = engine.__dict__.get("exact") if isinstance(engine, Engine) else None
    if exact is not None and exact.choice is not None:
        found["slopes"] = exact.choice
    return found


def _order(trainer: Trainer) -> list[list[str]]:
    """The names of the parameters of each group of the optimizer."""
    names = {id(value): name for name, value in trainer.engine.params.items()}
    groups = trainer.optimizer.param_groups
    return [[names.get(id(value), "") for value in group["params"]] for group in groups]


def _numbered(saved: dict[str, Any], then: list[list[str]], now: list[list[str]]) -> dict[str, Any]:
    """An optimizer's state with the numbers that its parameters have now.

    Raises:
        ValueError: its groups hold others.
    """
    if [sorted(group) for group in then] != [sorted(group) for group in now]:
        raise ValueError("the optimizer's groups hold other parameters than they did")
    number = {name: place for place, name in enumerate(n for group in now for n in group)}
    old = [name for group in then for name in group]
    groups = [
        {**group, "params": [number[name] for name in names]}
        for group, names in zip(saved["param_groups"], now, strict=True)
    ]
    state = {number[old[place]]: values for place, values in saved["state"].items()}
    return {**saved, "state": state, "param_groups": groups}


def _load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """With the dtypes that were saved; torch casts what a state holds to the parameter's."""
    optimizer.load_state_dict(saved)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in saved["state"].items():
        own = optimizer.state[params[number]]
        for name, value in values.items():
            if isinstance(value, Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device)
