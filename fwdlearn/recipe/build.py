"""From a checked recipe to a trainer, with every failure at the section that caused it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fwdlearn.arithmetic import alike
from fwdlearn.baselines import BaselineTrainer, is_baseline
from fwdlearn.data import Data, DataInfo
from fwdlearn.data.seen import seen
from fwdlearn.data.types import passes
from fwdlearn.engine import trainable
from fwdlearn.errors import FwdlearnError, MissingError, UsageError
from fwdlearn.local import local_rows
from fwdlearn.memory import free_bytes, weights_bytes
from fwdlearn.models import Built
from fwdlearn.optim import Several
from fwdlearn.recipe.component import Component
from fwdlearn.recipe.load import Recipe
from fwdlearn.recipe.source import Problem
from fwdlearn.signals import measured
from fwdlearn.sinks import Sink
from fwdlearn.trainer import Trainer


@dataclass(frozen=True)
class Assembly:
    """A trainer and what it was made of."""

    trainer: Trainer
    built: Built
    data: Data


def build(recipe: Recipe, sinks: Sequence[Sink] = ()) -> Trainer:
    """The trainer that a recipe describes.

    Args:
        recipe: from `load_recipe`.
        sinks: where the run reports to; a recipe's own tracking belongs to `run.train`.

    Raises:
        RecipeError: a part cannot be made, or does not fit the others.
        MissingError: data, a model or a package is not there.
    """
    return assemble(recipe, sinks).trainer


def assemble(
    recipe: Recipe, sinks: Sequence[Sink] = (), loaded: tuple[Data, Built] | None = None
) -> Assembly:
    """The same, with the model and the data beside the trainer; both may be `loaded` already."""
    parts = recipe.components
    device = device_of(recipe)
    data, built = loaded or load_parts(recipe)
    module = built.module
    if recipe.trainer.offload is None:
        module = _placed(recipe, module, device)
    made: dict[str, Any] = {}
    for name in ("objective", "estimator", "allocator"):
        with blaming(recipe, parts[name]):
            made[name] = parts[name]()
    optimizer = _optimizer(recipe, trainable(module))
    schedule = None
    if "optimizer.schedule" in parts:
        steps = _steps(recipe, made["estimator"], made["allocator"], module, data)
        with blaming(recipe, parts["optimizer.schedule"]):
            schedule = parts["optimizer.schedule"](
                optimizer=optimizer, T_max=steps, total_steps=steps, total_iters=steps
            )
    settings = recipe.trainer.model_dump() | {"device": device, "seed": recipe.seed}
    try:
        trainer = (BaselineTrainer if is_baseline(made["estimator"]) else Trainer)(
            module,
            data,
            made["objective"],
            made["estimator"],
            made["allocator"],
            optimizer,
            schedule=schedule,
            metrics={metric.short: metric() for metric in recipe.metrics},
            sinks=sinks,
            **settings,
        )
    except (UsageError, MissingError, ValueError, TypeError) as error:
        raise recipe.error([_blame_trainer(error, recipe)]) from error
    return Assembly(trainer, built, data)


def _placed(recipe: Recipe, module: nn.Module, device: str) -> nn.Module:
    """The module on the device, if it has room for it."""
    needed, room = weights_bytes(module), free_bytes(device)
    if torch.device(device).type != "cpu" and room is not None and needed > room:
        message = (
            f"the model has {needed / 2**30:.1f} GiB of weights, and {device} has "
            f"{room / 2**30:.1f} GiB free; set trainer.offload=cpu to keep them in host memory, or "
            "to a folder on a disk (`fwdlearn explain` says what that takes)"
        )
        raise recipe.error([Problem(("trainer",), message, "key")])
    return module.to(device)


def load_parts(recipe: Recipe) -> tuple[Data, Built]:
    """The data, prepared for the model, and the model with its first weights."""
    parts = recipe.components
    with blaming(recipe, parts["data"]):
        data = parts["data"]()
    built = load_model(recipe, data.info)
    with blaming(recipe, parts["data"]):
        data = data.prepared(built.processor)
    if built.prefix is None:
        return data, built
    with blaming(recipe, parts["model"]):
        return seen(data, built.prefix, device_of(recipe), built.cache), built


def load_model(recipe: Recipe, info: DataInfo) -> Built:
    """The model with its first weights."""
    part = recipe.components["model"]
    with blaming(recipe, part), torch.random.fork_rng(devices=[]), alike():
        # For models that know nothing of seeds; ours draw from their own.
        torch.default_generator.manual_seed(recipe.seed)
        made = part(info=info, seed=recipe.seed)
        built = made if isinstance(made, Built) else Built(made)
        if not isinstance(built.module, nn.Module):
            raise TypeError(f"must give an nn.Module, got {type(built.module).__name__}")
    return built


def device_of(recipe: Recipe) -> str:
    """The device that `trainer.device` names, `auto` decided."""
    if recipe.trainer.device != "auto":
        return recipe.trainer.device
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def blaming(recipe: Recipe, component: Component) -> Iterator[None]:
    """Inside, errors that a component can be blamed for name its place in the recipe."""
    try:
        yield
    except (MissingError, UsageError, ValueError, TypeError, OSError, RuntimeError) as error:
        if isinstance(error, FwdlearnError) and not isinstance(error, MissingError | UsageError):
            raise
        problem = component.blame(error)
        raise recipe.error([problem]) from error


def _optimizer(recipe: Recipe, params: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer, or several as one; a parameter goes with the first pattern that it matches."""
    left, groups = dict(params), []
    others: list[tuple[Component, list[dict[str, Any]]]] = []
    for pattern, group in recipe.groups.items():
        names = fnmatch.filter(left, pattern)
        if not names:
            known = ", ".join(list(left)[:3]) or "none that is left"
            message = f"the pattern matches no trainable parameter; the first are {known}"
            raise recipe.error([Problem(group.path, message, "key")])
        held = {"params": [left.pop(name) for name in names]}
        if group.kind == "optimizer":
            others.append((group, [held]))
        else:
            groups.append({**held, **group.arguments})
    if left:
        groups.insert(0, {"params": list(left.values())})
    made = []
    for component, own in [(recipe.components["optimizer"], groups), *others]:
        if own:
            with blaming(recipe, component):
                made.append(component(params=own))
    return made[0] if len(made) == 1 else Several(made)


def _steps(recipe: Recipe, estimator: Any, allocator: Any, module: nn.Module, data: Data) -> int:
    """How many steps the run takes."""
    if recipe.trainer.steps is not None:
        return recipe.trainer.steps
    rows = min(recipe.trainer.batch_size, len(data.train))
    pairs = allocator.budget(rows, allocator.init())
    cost = estimator.traits.cost(rows, pairs, measured(allocator.signals))
    cost = cost * passes(data.train) + local_rows(module, rows)
    return max(1, (recipe.trainer.queries or 0) // cost)


def _blame_trainer(error: Exception, recipe: Recipe) -> Problem:
    """The section that an error of the trainer's construction speaks of."""
    message = str(error)
    missing = isinstance(error, MissingError)
    for name in type(recipe.trainer).model_fields:
        if f"({name}=" in message or message.startswith(f"{name} "):
            return Problem(("trainer", name), message, missing=missing)
    sections: Mapping[str, Component] = recipe.components
    for component in sections.values():
        words = {component.name, component.target.rpartition(":")[2]}
        if any(word in message for word in words):
            return Problem((*component.path, "name"), message, missing=missing)
    return Problem(("trainer",), message, "key", missing=missing)
