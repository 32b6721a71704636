"""A run that begins where another one is, with a recipe of its own."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fwdlearn.errors import UsageError
from fwdlearn.ledger.header import tensors_of
from fwdlearn.ledger.records import Record
from fwdlearn.progress import Progress

if TYPE_CHECKING:
    from fwdlearn.trainer import Trainer


@dataclass(frozen=True)
class Parent:
    """A run as it was after a step, for another to begin with.

    Args:
        trainer: that holds it.
        at: where it was.
        records: of its steps so far.
        about: what the new run's ledger says of it: `ledger` (the running hash), `step`, `run`,
            `changed` (the keys of the recipe).
        fresh: sections whose states begin anew: "estimator", "allocator", "optimizer".
    """

    trainer: Trainer
    at: Progress
    records: Collection[Record]
    about: Mapping[str, Any]
    fresh: Collection[str]


@torch.no_grad()
def adopt(parent: Parent, trainer: Trainer) -> Progress:
    """Makes a trainer go on from where another one is; returns where that is.

    Weights and buffers are taken over, and the states of what is the same. A learning-rate schedule
    is the new recipe's own, at the same step.

    Raises:
        UsageError: the model has other tensors, sequences are cut otherwise, or there is nothing
            left to do.
    """
    there, here = tensors_of(parent.trainer), tensors_of(trainer)
    for name in [*there, *here]:
        old, new = (_kind(tensors.get(name)) for tensors in (there, here))
        if old != new:
            raise UsageError(
                f"--fork: the model is another: {name} is {old} there and {new} here; what was "
                "trained cannot carry over. Keep the section `model`, or start a new run."
            )
    pieces = [(one.every, one.every and one.batch_size) for one in (parent.trainer, trainer)]
    if pieces[0] != pieces[1]:
        raise UsageError(
            "--fork: updates within sequences (trainer.every) go on with the states of their rows, "
            "so trainer.every and trainer.batch_size must stay."
        )
    with torch.inference_mode():
        for name, value in there.items():
            here[name].copy_(value)
    if "optimizer" not in parent.fresh:
        _carry(parent.trainer, trainer)
    start, at = trainer.start(), parent.at
    state = start.state if "estimator" in parent.fresh else at.state
    plans = start.plans if "allocator" in parent.fresh else at.plans
    made = Progress(state, plans, at.step, at.spent, seconds=at.seconds, first=at.first)
    if not trainer._affords(made):
        raise UsageError(
            f"--fork: {made.step} steps ({made.spent} queries) have been taken, and trainer.steps "
            "and trainer.queries count them: give more."
        )
    with warnings.catch_warnings():
        # Torch knows of no optimizer that has stepped elsewhere.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        trainer._reschedule(made)
    return made


def _carry(old: Trainer, new: Trainer) -> None:
    """The states of an optimizer, parameter by parameter; its settings are the new recipe's."""
    for name, parameter in new.engine.params.items():
        state = old.optimizer.state.get(old.engine.params[name])
        if state:
            new.optimizer.state[parameter] = {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in state.items()
            }


def _kind(value: torch.Tensor | None) -> str:
    return "absent" if value is None else f"{value.dtype} {list(value.shape)}"
