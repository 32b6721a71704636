"""Checks that need the components themselves: trial runs of constructors, and how parts fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fwdlearn.baselines import ReverseOracle, is_baseline
from fwdlearn.recipe.component import Component
from fwdlearn.recipe.schema import Fixed
from fwdlearn.recipe.source import Problem
from fwdlearn.step_oracle import StepOracle

_ANY_STEPS = 1000
"""Stands in for the number of steps where a budget in queries decides it later."""


def check_together(
    components: Mapping[str, Component],
    sinks: Sequence[Component],
    groups: Mapping[str, Component],
    fixed: Fixed,
) -> list[Problem]:
    """Everything that is wrong with well-formed components."""
    problems = _check_paths(components.get("data"))
    made: dict[str, Any] = {}
    trials = [components[name] for name in ("estimator", "allocator") if name in components]
    objective = components.get("objective")
    if objective is not None and isinstance(objective.factory, type):
        trials.append(objective)
    for component in (*trials, *sinks):
        problems += _try(component, made, folder=Path("."), config={}, warn=print)
    optimizer, schedule = components.get("optimizer"), components.get("optimizer.schedule")
    if optimizer is not None:
        # A matrix, because some optimizers take nothing else.
        parameter = torch.nn.Parameter(torch.zeros(2, 2))
        others = [group for group in groups.values() if group.kind == "optimizer"]
        for one in (*others, optimizer):
            problems += _try(_light(one), made, params=[parameter])
    if schedule is not None and "optimizer" in made:
        steps = fixed.trainer.steps or _ANY_STEPS
        lengths = {"T_max": steps, "total_steps": steps, "total_iters": steps}
        problems += _try(schedule, made, optimizer=made["optimizer"], **lengths)
    if "estimator" in made:
        problems += _check_needs(components["estimator"], made["estimator"])
    return problems + _check_device(fixed.trainer.device)


def _try(component: Component, made: dict[str, Any], **provided: Any) -> list[Problem]:
    try:
        made[component.kind] = component(**provided)
    except Exception as error:  # anyone's constructor, which may raise anything
        return [component.blame(error)]
    return []


def _light(optimizer: Component) -> Component:
    """The optimizer in a form that is quick to try.

    torch's `add_param_group` loads the compiler, which takes longer than all other checks.
    """
    factory = optimizer.factory
    if not (isinstance(factory, type) and issubclass(factory, torch.optim.Optimizer)):
        return optimizer

    def add_param_group(self: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        self.param_groups.append({**self.defaults, **group})

    return replace(
        optimizer, factory=type(factory.__name__, (factory,), {"add_param_group": add_param_group})
    )


def _check_paths(data: Component | None) -> list[Problem]:
    """Files that data is read from have to be there."""
    if data is None:
        return []
    paths = {
        key: value
        for key, value in data.arguments.items()
        if (key == "path" or key.endswith("_path")) and isinstance(value, str | Path)
    }
    return [
        Problem(
            (*data.path, key),
            f"there is no file or folder {str(value)!r}; correct the path, which is "
            f"{'absolute' if Path(value).is_absolute() else 'relative to the current folder'}",
            missing=True,
        )
        for key, value in paths.items()
        if not Path(value).expanduser().exists()
    ]


def _check_needs(component: Component, estimator: Any) -> list[Problem]:
    """The model's oracle has to offer what the estimator asks for."""
    needs = getattr(getattr(estimator, "traits", None), "needs", None)
    if not isinstance(needs, type):
        message = f"{component.target} is no estimator: it has no traits that say what it needs"
        return [Problem((*component.path, "name"), message)]
    members = {
        name
        for base in needs.__mro__
        if getattr(base, "_is_protocol", False)
        for name in vars(base)
        if not name.startswith("_")
    }
    oracle = ReverseOracle if is_baseline(estimator) else StepOracle
    lacking = sorted(name for name in members if not hasattr(oracle, name))
    if not lacking:
        return []
    message = (
        f"{component.name} needs {needs.__name__}; {oracle.__name__} lacks {', '.join(lacking)}. "
        "Choose an estimator that needs LossOracle alone (`fwdlearn ls` shows what each one needs)."
    )
    return [Problem((*component.path, "name"), message)]


def _check_device(device: str) -> list[Problem]:
    if not device.startswith("cuda"):
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index < count:
        return []
    here = f"there are {count} CUDA devices here" if count else "there is no CUDA device here"
    return [Problem(("trainer", "device"), f"{here}; use auto or cpu")]
