"""Files of one JSON object a line, and which of them are for training and for evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fwdlearn.data.files import existing, text_of
from fwdlearn.data.split import held_out, limited
from fwdlearn.errors import MissingError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """An object, and where it stands.

    Args:
        where: `file:line`.
        object: what the line holds.
    """

    where: str
    object: dict[str, Any]

    def value(self, key: str) -> Any:
        """What the object has under a key; raises UsageError where it has none."""
        if key not in self.object:
            found = ", ".join(repr(name) for name in self.object) or "none"
            raise UsageError(f"{self.where}: the key {key!r} is missing; the line has {found}.")
        return self.object[key]

    def text(self, key: str) -> str:
        """A string under a key; raises UsageError where it is none."""
        value = self.value(key)
        if not isinstance(value, str):
            raise UsageError(f"{self.where}: {key!r} must be a string, got {value!r}.")
        return value


def objects(path: Path, example: str) -> Iterator[Line]:
    """Every line that is not blank.

    Args:
        path: the file.
        example: of a line, for messages.

    Raises:
        UsageError: the file is not UTF-8 or empty, or a line is no object.
    """
    # str.splitlines would also break at separators that are legal inside a JSON string.
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: not JSON ({error}); every line must be one object such as {example}."
            ) from error
        if not isinstance(row, dict):
            raise UsageError(
                f"{where}: a line must be an object such as {example}, got {type(row).__name__}."
            )
        yield Line(where, row)


@dataclass(frozen=True)
class Files:
    """Where rows come from, and how many.

    Args:
        owner: the loader, as the user calls it.
        path, evaluation_path, evaluation_fraction, train_rows, evaluation_rows, split_seed: see
            `fwdlearn.data.jsonl`.
    """

    owner: str
    path: str | Path
    evaluation_path: str | Path | None = None
    evaluation_fraction: float | None = None
    train_rows: int | None = None
    evaluation_rows: int | None = None
    split_seed: int = 0

    def found(self) -> tuple[Path, Path | None]:
        """The file for training, and the one for evaluation if there is one.

        Raises:
            MissingError: there is no such file.
            UsageError: two ways to evaluate are given.
        """
        owner = self.owner
        if self.evaluation_path is not None and self.evaluation_fraction is not None:
            raise UsageError(f"{owner}: give evaluation_path or evaluation_fraction, not both.")
        expected = "a .jsonl file or a folder with train.jsonl"
        place = existing(self.path, f"{owner}(path=...)", expected)
        file = self._in(place, ("train.jsonl",), "path")
        names = ("validation.jsonl", "test.jsonl")
        if self.evaluation_path is not None:
            expected = "a .jsonl file or a folder with validation.jsonl or test.jsonl"
            other = existing(self.evaluation_path, f"{owner}(evaluation_path=...)", expected)
            return file, self._in(other, names, "evaluation_path")
        if place.is_dir() and self.evaluation_fraction is None:
            return file, next((place / name for name in names if (place / name).is_file()), None)
        return file, None

    def divided(
        self, read: Callable[[Path], T], rows: Callable[[T], Tensor | Sequence[Any]]
    ) -> tuple[T, Tensor, tuple[T, Tensor] | None]:
        """What the files hold, with the numbers of its rows that are to be used.

        Args:
            read: a file.
            rows: one item for each row of what was read; int64 classes are split evenly.

        Returns:
            What the training file holds, int64 [rows] of it, and the same for evaluation.
        """
        file, other_file = self.found()
        held = read(file)
        train, evaluation = torch.arange(len(rows(held))), None
        if other_file is not None:
            other = read(other_file)
            evaluation = other, limited(len(rows(other)), self.evaluation_rows, self._rows)
        elif self.evaluation_fraction is not None:
            classes = rows(held)
            if not isinstance(classes, Tensor):
                classes = torch.zeros(len(classes), dtype=torch.int64)
            argument = f"{self.owner}(evaluation_fraction=...)"
            train, test = held_out(classes, self.evaluation_fraction, self.split_seed, argument)
            evaluation = held, test[limited(len(test), self.evaluation_rows, self._rows)]
        limit = limited(len(train), self.train_rows, f"{self.owner}(train_rows=...)")
        return held, train[limit], evaluation

    @property
    def _rows(self) -> str:
        return f"{self.owner}(evaluation_rows=...)"

    def _in(self, place: Path, names: Sequence[str], argument: str) -> Path:
        """The file itself, or the first of `names` in the folder."""
        if not place.is_dir():
            return place
        for name in names:
            if (place / name).is_file():
                return place / name
        raise MissingError(
            f"{self.owner}({argument}=...): the folder {place} has no {' or '.join(names)}; give "
            "the file itself if it has another name."
        )
