"""From what the user typed to a source: the file or shipped recipe, with overrides applied."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path as FilePath
from typing import Any

from fwdlearn.errors import RecipeError
from fwdlearn.recipe.source import Path, Problem, Source
from fwdlearn.recipe.text import MOST_CHARACTERS, parse
from fwdlearn.registry import nearest, suggest

COMPONENTS: tuple[Path, ...] = tuple(
    (name,) for name in ("model", "data", "objective", "estimator", "allocator", "optimizer")
) + (("optimizer", "schedule"),)
"""Where a component stands; there a bare name is short for `{name: ...}`."""

GROUPS: Path = ("optimizer", "groups")
"""Where parameters, by pattern of their names, get their own arguments of the optimizer."""


def shipped() -> dict[str, str]:
    """Name -> text of the recipes that come with fwdlearn."""
    folder = resources.files("fwdlearn.recipes")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in files}


def read(recipe: str, overrides: Sequence[str] = ()) -> tuple[Source, list[Problem]]:
    """Reads a recipe and applies `key=value` and `~key`.

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: the command line's words.

    Raises:
        RecipeError: there is no such recipe, or its file cannot be read.
    """
    name, text = _text(recipe)
    source, problems = parse(text, name)
    source.overrides = tuple(overrides)
    if problems and () in {problem.path for problem in problems}:
        return source, problems
    if source.data is None:
        problems.append(Problem((), "empty; start from `fwdlearn cp quickstart my.yaml`"))
        source.data = {}
    elif not isinstance(source.data, dict):
        problems.append(Problem((), "must be sections such as `model:`, not a list or a word"))
        source.data = {}
        return source, problems
    _spell_out(source)
    for word in overrides:
        problems += _apply(source, word)
    _spell_out(source)
    return source, problems


def recipe_name(recipe: str) -> str:
    """What the run is called: the file's name without its ending."""
    return FilePath(recipe).name.removesuffix(".yaml").removesuffix(".yml") or "run"


def _text(recipe: str) -> tuple[str, str]:
    path = FilePath(recipe)
    if path.is_dir():
        known = shipped()
        if recipe in known:
            return f"{recipe}.yaml", known[recipe]
        way = "give its resolved.yaml" if (path / "resolved.yaml").exists() else "give a file"
        raise RecipeError([f"{recipe}: is a folder, not a recipe; {way}"])
    if path.exists():
        try:
            with path.open("rb") as file:
                content = file.read(4 * MOST_CHARACTERS + 1)
            return recipe, content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            column = error.start - content.rfind(b"\n", 0, error.start)
            message = "not UTF-8 text; save the file as UTF-8"
            raise RecipeError([f"{recipe}:{line}:{column}: {message}"]) from error
        except OSError as error:
            raise RecipeError([f"{recipe}: cannot be read: {error.strerror}"]) from error
    known = shipped()
    name = recipe.removesuffix(".yaml")
    if name in known:
        return f"{name}.yaml", known[name]
    what = "no such file" if recipe != name or "/" in recipe else "no file or shipped recipe"
    near = nearest(name, known) or nearest(path.stem, known)
    way = f"did you mean {near!r}?" if near else f"shipped recipes are {', '.join(known)}"
    raise RecipeError([f"{recipe}: {what} of that name; {way}"])


def _spell_out(source: Source) -> None:
    for path in COMPONENTS:
        section: Any = source.data
        for part in path[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(path[-1]), str):
            section[path[-1]] = {"name": section[path[-1]]}
            for marks in (source.keys, source.values):
                if path in source.values:
                    marks[(*path, "name")] = source.values[path]


def _apply(source: Source, word: str) -> list[Problem]:
    removes = word.startswith("~")
    key, equals, text = word.removeprefix("~").partition("=")
    path: Path = tuple(key.split("."))
    if not all(path) or removes == bool(equals):
        source.given.add((word,))
        return [Problem((word,), "not understood; write key=value, or ~key to remove a key")]
    source.given.add(path)
    section = source.data
    for part in path[:-1]:
        inner = section.get(str(part))
        is_switch = path[0] == "tracking" and isinstance(inner, bool)
        if (inner is None or is_switch) and not removes:
            inner = section[str(part)] = {}
        if not isinstance(inner, dict):
            state = "is not in the recipe" if inner is None else "holds a value, not keys"
            return [Problem(path, f"{part!r} {state}; see `fwdlearn validate` for what is there")]
        section = inner
    last = str(path[-1])
    if removes:
        if last not in section:
            near = suggest(last, section)
            return [Problem(path, f"not in the recipe, so it cannot be removed; {near}")]
        del section[last]
        return []
    value, problems = parse(text, word)
    if problems:
        rule = "; ".join(problem.message for problem in problems)
        return [Problem(path, f"{text!r}: {rule}")]
    section[last] = value.data
    return []
