"""`fwdlearn ls`: every name that a recipe can use, without importing torch."""

from __future__ import annotations

import shutil
import sys

import typer

from fwdlearn.errors import UsageError
from fwdlearn.recipe.definitions import definition
from fwdlearn.recipe.locate import shipped
from fwdlearn.registry import KINDS, SUMMARIES, entries, suggest


def listing(kind: str | None) -> None:
    """Prints name, kind and one line for each, of one kind or of all."""
    kinds = ("recipe", *KINDS)
    if kind is not None and kind not in kinds:
        kind = kind.removesuffix("s")
    if kind is not None and kind not in kinds:
        raise UsageError(f"unknown kind {kind!r}; {suggest(kind, kinds)}")
    rows = [
        (name, each, line)
        for each in (kinds if kind is None else (kind,))
        for name, line in (_recipes() if each == "recipe" else _components(each))
    ]
    names = max(len(name) for name, _, _ in rows)
    width = max(len(each) for _, each, _ in rows)
    # Cut on a terminal; whole where a program reads.
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    room = max(20, columns - names - width - 4)
    for name, each, line in rows:
        shown = line if len(line) <= room else line[: room - 1] + "…"
        typer.echo(f"{typer.style(f'{name:{names}}', bold=True)}  {each:{width}}  {shown}")


def _recipes() -> list[tuple[str, str]]:
    return [(name, text.splitlines()[0].lstrip("# ")) for name, text in shipped().items()]


def _components(kind: str) -> list[tuple[str, str]]:
    lines = []
    for name, entry in entries(kind).items():
        try:
            target = entry.target
        except UsageError as clash:
            lines.append((name, str(clash)))
            continue
        ours = entry.owners[0] == "fwdlearn"
        found = None if ours and name in SUMMARIES else definition(target)
        line = found.summary if found is not None else SUMMARIES.get(name, "")
        if found is not None and found.needs:
            line += f" Needs {found.needs}."
        lines.append((name, line if ours else f"{line} ({entry.owners[0]})"))
    return lines
