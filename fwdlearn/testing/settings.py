"""Checks that estimators and allocators share: settings are frozen data."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from typing import Any, TypeVar

from fwdlearn.testing.report import Figure

T = TypeVar("T")


def fresh(instance: T) -> T:
    """A new object of the same settings and nothing else."""
    if dataclasses.is_dataclass(instance) and not isinstance(instance, type):
        return dataclasses.replace(instance)
    return copy.copy(instance)


def frozen_figure(instance: Any) -> Figure:
    """Whether it is a dataclass, and a frozen one."""
    params = getattr(type(instance), "__dataclass_params__", None)
    missing = int(params is None) + int(params is not None and not params.frozen)
    return Figure("missing of @dataclass and frozen=True:", missing)


def survival_figure(instance: Any) -> Figure:
    """Counts the ways of copying (repr, pickle, replace) that lose a setting."""
    kind = type(instance)
    module = sys.modules[kind.__module__]
    # repr writes the qualified name, whose first word need not be a name of the module.
    written = repr(instance).removeprefix(kind.__qualname__)
    copies = {
        "repr": lambda: eval("_kind" + written, {**vars(module), "_kind": kind}),
        "pickle": lambda: pickle.loads(pickle.dumps(instance)),
        "replace": lambda: dataclasses.replace(instance),
    }
    lost = []
    for way, make in copies.items():
        try:
            if make() != instance:
                lost.append(way)
        # Any exception means that this way does not work; its text tells why.
        except Exception as error:
            lost.append(f"{way} ({type(error).__name__}: {error})")
    what = "ways of copying that lose a setting:"
    return Figure(" ".join([what, *lost]) if lost else what, len(lost))


def settings_of(instance: Any) -> dict[str, Any]:
    """A deep copy of the fields, by name."""
    if not dataclasses.is_dataclass(instance):
        return copy.deepcopy(vars(instance))
    names = [field.name for field in dataclasses.fields(instance)]
    return {name: copy.deepcopy(getattr(instance, name)) for name in names}
