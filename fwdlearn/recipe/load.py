"""A recipe from text to checked components, with every problem told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fwdlearn.errors import MissingError, RecipeError
from fwdlearn.recipe.component import Component, bind, check_form
from fwdlearn.recipe.locate import COMPONENTS, GROUPS, read, recipe_name
from fwdlearn.recipe.schema import CompareSection, Fixed, OutputSection, TrainerSection, check_fixed
from fwdlearn.recipe.source import Path, Problem, Source, dotted
from fwdlearn.recipe.text import dump
from fwdlearn.registry import entries, nearest, suggest

DEFAULTS = {"objective": "cross_entropy", "allocator": "Uniform"}


@dataclass(frozen=True)
class Recipe:
    """A recipe without problems.

    Args:
        name: what the run is called.
        source: its text, and where each key stands.
        components: model, data, objective, estimator, allocator, optimizer and perhaps
            optimizer.schedule.
        groups: pattern of parameter names -> the optimizer with what differs for them, or
            another optimizer.
        sinks: tracking, in the order asked for.
        metrics: figures that evaluations have beside their own.
        fixed: the other sections.
    """

    name: str
    source: Source
    components: Mapping[str, Component]
    groups: Mapping[str, Component]
    sinks: tuple[Component, ...]
    metrics: tuple[Component, ...]
    fixed: Fixed

    @property
    def trainer(self) -> TrainerSection:
        return self.fixed.trainer

    @property
    def output(self) -> OutputSection:
        return self.fixed.output

    @property
    def compare(self) -> CompareSection:
        return self.fixed.compare

    @property
    def seed(self) -> int:
        return self.fixed.seed

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain values."""
        sections = {
            name: {"name": component.name, **component.settings}
            for name, component in self.components.items()
        }
        schedule = sections.pop("optimizer.schedule", None)
        if schedule is not None:
            sections["optimizer"]["schedule"] = schedule
        if self.groups:
            groups = {
                pattern: {"name": group.name} | group.settings
                if group.kind == "optimizer"
                else group.settings
                for pattern, group in self.groups.items()
            }
            sections["optimizer"]["groups"] = groups
        return {
            **sections,
            "trainer": self.trainer.model_dump(),
            "output": self.output.model_dump(),
            "tracking": {sink.name: sink.settings for sink in self.sinks},
            "seed": self.seed,
            **({"metrics": [_section(one) for one in self.metrics]} if self.metrics else {}),
            **({"compare": self.compare.model_dump()} if self.source.data.get("compare") else {}),
        }

    def to_yaml(self) -> str:
        """`resolved` as a recipe that loads to the same."""
        return dump(self.resolved())

    def error(self, problems: Sequence[Problem]) -> RecipeError | MissingError:
        """The problems as one error."""
        return _error(self.source, problems)


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    The text, the fixed sections and the names are checked first, without importing torch; the
    arguments of components then need their signatures, and so their modules.

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: `key=value` (dotted keys) to set, `~key` to remove.

    Raises:
        RecipeError: with all problems, one line each.
        MissingError: the same, when all that is wrong is a file or package that is not there.
    """
    source, problems = read(recipe, overrides)
    if any(problem.path == () for problem in problems):
        raise _error(source, problems)
    fixed, more = check_fixed(source.data)
    problems += more
    sections, more = _sections(source.data)
    form = [
        problem
        for kind, path, name, given in sections
        for problem in check_form(kind, path, name, given)
    ]
    if fixed is None or problems or more:
        raise _error(source, [*problems, *more, *form])

    from fwdlearn.recipe.checks import check_together  # imports torch

    components: dict[str, Component] = {}
    sinks: list[Component] = []
    metrics: list[Component] = []
    groups: dict[str, Component] = {}
    for kind, path, name, given in sections:
        component, more = bind(kind, path, name, given)
        problems += more
        if component is None:
            continue
        if kind == "sink":
            sinks.append(component)
        elif kind == "metric":
            metrics.append(component)
        elif path[:-1] == GROUPS:
            groups[str(path[-1])] = component
        else:
            components[dotted(path)] = component
    problems += check_together(components, sinks, groups, fixed)
    if problems or form:
        raise _error(source, problems or form)
    order = [dotted(path) for path in COMPONENTS if dotted(path) in components]
    ordered = {name: components[name] for name in order}
    name, others = recipe_name(recipe), (tuple(sinks), tuple(metrics))
    return Recipe(name, source, ordered, groups, *others, fixed)


def _section(component: Component) -> dict[str, Any]:
    return {"name": component.name, **component.settings}


Section = tuple[str, Path, str, dict[str, Any]]


def _sections(data: dict[str, Any]) -> tuple[list[Section], list[Problem]]:
    """The component sections as (kind, path, name, arguments)."""
    problems: list[Problem] = []
    found: list[Section] = []
    for path in COMPONENTS:
        holder = data.get(str(path[0])) if len(path) == 2 else data
        section = holder.get(str(path[-1])) if isinstance(holder, dict) else None
        kind = str(path[-1])
        if section is None:
            if kind not in DEFAULTS:
                continue
            section = {"name": DEFAULTS[kind]}
        if not isinstance(section, dict):
            message = f"must be `name:` and arguments, got {section!r}"
            problems.append(Problem(path, message))
        elif section.get("name") is None and (typo := _meant_name(section)) is not None:
            problems.append(Problem((*path, typo), "unknown key; did you mean 'name'?", "key"))
        elif not isinstance(section.get("name"), str):
            state = "missing" if section.get("name") is None else "must be text"
            names = suggest(str(section.get("name", "")), entries(kind))
            at = Problem((*path, "name"), f"{state}; {names}", "value")
            problems.append(at)
        else:
            nested = {inner[-1] for inner in COMPONENTS if inner[:-1] == path}
            nested |= {inner[-1] for inner in (GROUPS,) if inner[:-1] == path}
            given = {k: v for k, v in section.items() if k != "name" and k not in nested}
            found.append((kind, path, section["name"], given))
            if kind == "optimizer":
                more, wrong = _groups(section["name"], section.get(GROUPS[-1]))
                found += more
                problems += wrong
    more, wrong = _metrics(data.get("metrics"))
    found += more
    problems += wrong
    tracking = data.get("tracking") or {}
    if not isinstance(tracking, dict):
        problems.append(Problem(("tracking",), f"must be keys and values, got {tracking!r}"))
        return found, problems
    for name, section in tracking.items():
        path = ("tracking", name)
        if section is False:
            continue
        if name not in entries("sink") and ":" not in name:
            way = suggest(name, entries("sink"))
            problems.append(Problem(path, f"unknown sink; {way}", "key"))
        elif not (section is True or section is None or isinstance(section, dict)):
            problems.append(Problem(path, f"must be true or arguments, got {section!r}"))
        else:
            found.append(("sink", path, name, section if isinstance(section, dict) else {}))
    return found, problems


def _metrics(metrics: Any) -> tuple[list[Section], list[Problem]]:
    """What evaluations say beside their own figures: names, or `name:` and arguments."""
    if metrics is None:
        return [], []
    items = metrics if isinstance(metrics, list) else [metrics]
    found: list[Section] = []
    problems: list[Problem] = []
    for number, item in enumerate(items):
        section = {"name": item} if isinstance(item, str) else item
        if isinstance(section, dict) and isinstance(section.get("name"), str):
            given = {key: value for key, value in section.items() if key != "name"}
            found.append(("metric", ("metrics", number), section["name"], given))
        else:
            names = suggest("", entries("metric"))
            message = f"must be names, or `name:` and arguments, got {item!r}; {names}"
            problems.append(Problem(("metrics",), message))
    told = [name.rpartition(":")[2] for _, _, name, _ in found]
    for name in sorted({name for name in told if told.count(name) > 1}):
        problems.append(Problem(("metrics",), f"has {name!r} twice; keep one"))
    return found, problems


def _meant_name(section: Mapping[str, Any]) -> str | None:
    """The key that was meant to be `name`, if one comes near."""
    meant = (key for key, value in section.items() if isinstance(value, str))
    return next((key for key in meant if nearest(key, ["name"])), None)


def _groups(name: str, groups: Any) -> tuple[list[Section], list[Problem]]:
    """What differs for some parameters, by pattern of their names: arguments, or the optimizer."""
    if groups is None:
        return [], []
    if not isinstance(groups, dict):
        message = f"must be patterns of parameter names, each with its arguments, got {groups!r}"
        return [], [Problem(GROUPS, message)]
    found: list[Section] = []
    problems: list[Problem] = []
    for pattern, given in groups.items():
        path = (*GROUPS, pattern)
        if isinstance(given, dict) and given.get("name") is not None:
            rest = {key: value for key, value in given.items() if key != "name"}
            if isinstance(given["name"], str):
                found.append(("optimizer", path, given["name"], rest))
            else:
                message = f"must be text; {suggest('', entries('optimizer'))}"
                problems.append(Problem((*path, "name"), message, "value"))
        elif isinstance(given, dict) and given:
            found.append(("group", path, name, given))
        else:
            message = f"must be arguments of the optimizer, such as lr, got {given!r}"
            problems.append(Problem(path, message))
    return found, problems


def _error(source: Source, problems: Sequence[Problem]) -> RecipeError | MissingError:
    lines = source.lines(list(problems))
    if all(problem.missing for problem in problems):
        return MissingError("\n".join(lines))
    return RecipeError(lines)
