"""Components: a name or `module:attribute`, with arguments bound to the target's signature."""

from __future__ import annotations

import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fwdlearn.errors import FwdlearnError, MissingError, UsageError
from fwdlearn.recipe.annotations import convert, expressible, shown
from fwdlearn.recipe.definitions import definition
from fwdlearn.recipe.locate import COMPONENTS, GROUPS
from fwdlearn.recipe.source import Path, Problem, dotted
from fwdlearn.registry import KINDS, entries, load, suggest, target_of

CALLED = ("objective", "metric")
"""Kinds whose functions are called for every batch, with two arguments that come first."""

PROVIDED: Mapping[str, frozenset[str]] = {
    "model": frozenset({"info"}),
    "optimizer": frozenset({"params"}),
    "group": frozenset({"params"}),
    "schedule": frozenset({"optimizer", "last_epoch"}),
    "sink": frozenset({"folder", "config", "process", "warn"}),
}
"""Arguments that building gives and a recipe cannot."""

FILLED: Mapping[str, frozenset[str]] = {
    "model": frozenset({"seed"}),
    "schedule": frozenset({"T_max", "total_steps", "total_iters"}),
}
"""Arguments that building gives when the recipe does not."""


@dataclass(frozen=True)
class Component:
    """A checked component, ready to be called.

    Args:
        kind: a kind of the registry.
        path: its section.
        name: as the recipe names it.
        target: `module:attribute`.
        factory: what the target is.
        arguments: what the recipe gives, as the signature wants it.
        settings: as the recipe gives them, with the defaults filled in.
        wants: names from `PROVIDED` and `FILLED` that the factory takes and the recipe leaves out.
    """

    kind: str
    path: Path
    name: str
    target: str
    factory: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    wants: frozenset[str] = frozenset()

    def __call__(self, **provided: Any) -> Any:
        """Calls the factory with the recipe's arguments and those of `provided` that it wants."""
        more = {name: value for name, value in provided.items() if name in self.wants}
        if self.kind in CALLED and not isinstance(self.factory, type):
            return partial(self.factory, **self.arguments) if self.arguments else self.factory
        return self.factory(**self.arguments, **more)

    @property
    def short(self) -> str:
        """The name without the module that it is in."""
        return self.name.rpartition(":")[2].rpartition(".")[2]

    def blame(self, error: Exception) -> Problem:
        """The problem that an error of the factory is, at the argument that it names."""
        message = str(error).strip() or type(error).__name__
        if not isinstance(error, FwdlearnError) and self.name not in message:
            message = f"{self.name}: {message}"
        named = [key for key in self.settings if f"({key}=" in message or f" {key}=" in message]
        ends = [key for key, value in self.arguments.items() if message.endswith(f": {value}")]
        suspects = named if len(named) == 1 else ends if len(ends) == 1 else []
        missing = isinstance(error, MissingError)
        if suspects:
            return Problem((*self.path, suspects[0]), message, missing=missing)
        return Problem((*self.path, "name"), message, missing=missing)


def check_form(kind: str, path: Path, name: Any, given: Mapping[str, Any]) -> list[Problem]:
    """What can be told without importing the target: its name, and the names of its arguments."""
    try:
        target = _target(kind, name)
    except UsageError as error:
        # A group repeats its optimizer's name, where the same problem is told.
        return [] if kind == "group" else [Problem((*path, "name"), str(error))]
    found = definition(target)
    if found is None or found.parameters is None:
        return []
    required = dict(found.parameters)
    if kind in CALLED and found.is_function:
        required = dict(list(required.items())[2:])
    return _check_names(kind, path, given, required)


def bind(
    kind: str, path: Path, name: str, given: Mapping[str, Any]
) -> tuple[Component | None, list[Problem]]:
    """Imports the target and binds arguments to its signature.

    An argument that is named like a kind, and of a type that YAML cannot write, is a component of
    that kind itself: `set: {name: L1Ball, radius: 30}`.

    Args:
        kind: a kind of the registry.
        path: the section.
        name: a registered name or `module:attribute`.
        given: the section's other keys.
    """
    try:
        target = _target(kind, name)
        factory = load(target)
        parameters, open_ended = _parameters(kind, target, factory)
    except (UsageError, MissingError) as error:
        if kind == "group":
            return None, []
        missing = isinstance(error, MissingError)
        return None, [Problem((*path, "name"), str(error), missing=missing)]
    required = {key: each.default is inspect.Parameter.empty for key, each in parameters.items()}
    problems = _check_names(kind, path, given, required, open_ended)
    arguments: dict[str, Any] = {}
    settings = dict(given)
    for key, value in given.items():
        absent = value is None and required.get(key, False)
        if absent or (key not in required and not open_ended):
            continue
        annotation = parameters[key].annotation if key in parameters else Any
        if key in KINDS and expressible(annotation) is None:
            arguments[key], settings[key], more = _inner(key, (*path, key), value)
            problems += more
            continue
        try:
            arguments[key] = convert(annotation, value)
        except ValueError as error:
            problems.append(Problem((*path, key), str(error)))
    if problems:
        return None, problems
    reserved = PROVIDED.get(kind, frozenset()) | FILLED.get(kind, frozenset())
    for key, parameter in parameters.items():
        if (
            kind != "group"
            and key not in given
            and key not in reserved
            and _is_plain(parameter.default)
        ):
            settings[key] = json.loads(json.dumps(parameter.default, default=str))
    wants = frozenset((reserved & parameters.keys()) - arguments.keys())
    return Component(kind, path, name, target, factory, arguments, settings, wants), []


def _inner(kind: str, path: Path, section: Any) -> tuple[Any, Any, list[Problem]]:
    """A component that is an argument of another: made, as resolved settings, and its problems."""
    if isinstance(section, str):
        section = {"name": section}
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        names = suggest("", entries(kind))
        message = f"must be a name, or `name:` and arguments, got {shown(section)}; {names}"
        return None, section, [Problem(path, message)]
    given = {key: value for key, value in section.items() if key != "name"}
    component, problems = bind(kind, path, section["name"], given)
    if component is None:
        return None, section, problems
    try:
        return component(), {"name": component.name, **component.settings}, []
    except Exception as error:  # anyone's constructor, which may raise anything
        return None, section, [component.blame(error)]


def _target(kind: str, name: str) -> str:
    """`module:attribute`; a group is spoken of in terms of its optimizer."""
    return target_of("optimizer" if kind == "group" else kind, name)


def _parameters(kind: str, target: str, factory: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that can be given by keyword, and whether any other name is taken too."""
    if not callable(factory):
        raise UsageError(f"{target} is {type(factory).__name__}, which cannot be called")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{target} has no signature to bind arguments to") from error
    try:
        owner = factory.__init__ if inspect.isclass(factory) else factory
        hints = typing.get_type_hints(owner, include_extras=True)
    except (NameError, TypeError, AttributeError):
        hints = {}
    found = list(signature.parameters.values())
    if kind in CALLED and not inspect.isclass(factory):
        found = found[2:]  # come with every batch
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in found)
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        parameter.name: parameter.replace(annotation=hints.get(parameter.name, Any))
        for parameter in found
        if parameter.kind in by_keyword
    }, open_ended


def _check_names(
    kind: str,
    path: Path,
    given: Mapping[str, Any],
    required: Mapping[str, bool],
    open_ended: bool = False,
) -> list[Problem]:
    provided, filled = PROVIDED.get(kind, frozenset()), FILLED.get(kind, frozenset())
    known = [name for name in required if name not in provided]
    problems = []
    for key in given:
        if key in provided and key in required:
            problems.append(Problem((*path, key), "given by fwdlearn; remove it", "key"))
        elif key not in known and not open_ended:
            beside = [inner[-1] for inner in (*COMPONENTS, GROUPS) if inner[:-1] == path]
            way = suggest(key, [*known, *map(str, beside)]) if known else "it takes no arguments"
            problems.append(Problem((*path, key), f"unknown argument; {way}", "key"))
    for key in known if kind != "group" else ():
        if required[key] and given.get(key) is None and key not in filled:
            place = dotted((*path, key))
            message = f"missing; add it to the file, or {place}={key.upper()} on the command line"
            problems.append(Problem((*path, key), message, "value" if key in given else "key"))
    return problems


def _is_plain(value: Any) -> bool:
    """Whether YAML can hold a default; others are left to the signature."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)
