"""A recipe's text as plain values that remember where they were written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Path = tuple[str | int, ...]
"""The way to a value: the keys and list positions that lead to it."""


def dotted(path: Path) -> str:
    """`("trainer", "steps")` as `trainer.steps`, list positions as `hidden[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        path: the key that it is about.
        message: what is wrong; the way out.
        at: whether to point at the key or at its value.
        mark: where to point instead, when the path alone does not tell.
        missing: something outside the recipe is not there (a file, a package), so the exit status
            is 3 when nothing else is wrong.
    """

    path: Path
    message: str
    at: Literal["key", "value"] = "value"
    mark: tuple[int, int] | None = None
    missing: bool = False


@dataclass
class Source:
    """Values and their places.

    Args:
        name: the file, as messages show it.
        text: as read.
        data: plain dicts, lists and scalars.
        keys, values: 1-based (line, column) of each key and each value.
        given: paths that come from the command line instead.
        overrides: the command line's words.
    """

    name: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)
    given: set[Path] = field(default_factory=set)
    overrides: tuple[str, ...] = ()

    def lines(self, problems: list[Problem]) -> list[str]:
        """One line each, without repetitions, as they come in the file; overrides last."""

        def rank(problem: Problem) -> tuple[bool, tuple[int, int]]:
            return self._overridden(problem.path), self._mark(problem)

        return list(dict.fromkeys(self._line(each) for each in sorted(problems, key=rank)))

    def _line(self, problem: Problem) -> str:
        line, column = self._mark(problem)
        place = f"{self.name}:{line}:{column}"
        if self._overridden(problem.path):
            place = "command line"
        parts = [place, dotted(problem.path), problem.message]
        return " ".join(": ".join(part for part in parts if part).split())

    def _overridden(self, path: Path) -> bool:
        return any(path[:length] in self.given for length in range(1, len(path) + 1))

    def _mark(self, problem: Problem) -> tuple[int, int]:
        if problem.mark is not None:
            return problem.mark
        path = problem.path
        exact = self.values if problem.at == "value" else self.keys
        if path in exact:
            return exact[path]
        for length in range(len(path), 0, -1):
            for marks in (self.keys, self.values):
                if path[:length] in marks:
                    return marks[path[:length]]
        return 1, 1
