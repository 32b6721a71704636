"""Texts with labels, one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwdlearn.data.files import existing, text_of
from fwdlearn.data.labels import class_numbers, class_order
from fwdlearn.data.split import held_out, limited
from fwdlearn.data.types import Data, DataInfo, TextRows
from fwdlearn.errors import MissingError, UsageError


@dataclass(frozen=True)
class _Texts:
    path: Path
    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]
    lines: list[int]

    def where(self, row: int) -> str:
        return f"{self.path}:{self.lines[row]}"

    def rows(self, index: Tensor, targets: Tensor, max_length: int | None, pad: int) -> TextRows:
        chosen = index.tolist()
        pairs = None if self.pairs is None else [self.pairs[i] for i in chosen]
        texts = [self.texts[i] for i in chosen]
        lines = [self.lines[i] for i in chosen]
        return TextRows(texts, pairs, targets[index], str(self.path), lines, max_length, pad)


def jsonl(
    path: str | Path,
    evaluation_path: str | Path | None = None,
    evaluation_fraction: float | None = None,
    text: str = "text",
    label: str = "label",
    text_pair: str | None = None,
    regression: bool = False,
    max_length: int | None = None,
    pad_to_multiple: int = 8,
    train_rows: int | None = None,
    evaluation_rows: int | None = None,
    split_seed: int = 0,
) -> Data:
    """Loads texts; the model's tokenizer reads them once, in `Data.prepared`.

    Args:
        path: a file, or a folder with train.jsonl and, for evaluation, validation.jsonl or
            test.jsonl (the first of the two that exists).
        evaluation_path: another file, or folder with validation.jsonl or test.jsonl.
        evaluation_fraction: share of the rows held out for evaluation, above 0 and below 1.
        text: key of the text.
        label: key of the label: an integer or a string, or a number for regression.
        text_pair: key of a second text, for tasks on pairs.
        regression: the label is a number to predict and not a class.
        max_length: tokens of a row, at most; longer texts are cut. None: the tokenizer's limit.
        pad_to_multiple: a batch is padded to its longest row rounded up to a multiple of this,
            so that there are few different shapes.
        train_rows: use at most this many training rows, evenly spaced over the file.
        evaluation_rows: the same for evaluation.
        split_seed: of the split alone.

    Raises:
        MissingError: no such file or folder.
        UsageError: anything wrong in a file, as `file:line`.
    """
    if evaluation_path is not None and evaluation_fraction is not None:
        raise UsageError("jsonl: give evaluation_path or evaluation_fraction, not both.")
    for argument, value in (("max_length", max_length), ("pad_to_multiple", pad_to_multiple)):
        if value is not None and value < 1:
            raise UsageError(f"jsonl({argument}=...) must be at least 1, got {value!r}.")
    place = existing(path, "jsonl(path=...)", "a .jsonl file or a folder with train.jsonl")
    file = _file(place, ("train.jsonl",), "path")
    other_file = None
    if evaluation_path is not None:
        expected = "a .jsonl file or a folder with validation.jsonl or test.jsonl"
        other_file = existing(evaluation_path, "jsonl(evaluation_path=...)", expected)
        other_file = _file(other_file, ("validation.jsonl", "test.jsonl"), "evaluation_path")
    elif place.is_dir() and evaluation_fraction is None:
        names = (place / "validation.jsonl", place / "test.jsonl")
        other_file = next((name for name in names if name.is_file()), None)
    rows = _read(file, text, label, text_pair, regression)
    other = None if other_file is None else _read(other_file, text, label, text_pair, regression)
    if regression:
        info = DataInfo("text", (), None)
        targets = torch.tensor(rows.labels, dtype=torch.float32).unsqueeze(1)
        if other is not None:
            other_targets = torch.tensor(other.labels, dtype=torch.float32).unsqueeze(1)
    else:
        order = class_order(rows.labels, str(file))
        info = DataInfo("text", (), len(order), tuple(map(str, order)))
        targets = class_numbers(rows.labels, order, rows.where)
        if other is not None:
            other_targets = class_numbers(other.labels, order, other.where)
    train, evaluation = torch.arange(len(targets)), None
    if other is not None:
        limit = limited(len(other_targets), evaluation_rows, "jsonl(evaluation_rows=...)")
        evaluation = other.rows(limit, other_targets, max_length, pad_to_multiple)
    elif evaluation_fraction is not None:
        argument = "jsonl(evaluation_fraction=...)"
        train, test = held_out(targets, evaluation_fraction, split_seed, argument)
        test = test[limited(len(test), evaluation_rows, "jsonl(evaluation_rows=...)")]
        evaluation = rows.rows(test, targets, max_length, pad_to_multiple)
    train = train[limited(len(train), train_rows, "jsonl(train_rows=...)")]
    return Data(info, rows.rows(train, targets, max_length, pad_to_multiple), evaluation)


def _file(place: Path, names: Sequence[str], argument: str) -> Path:
    """The file itself, or the first of `names` in the folder."""
    if not place.is_dir():
        return place
    for name in names:
        if (place / name).is_file():
            return place / name
    raise MissingError(
        f"jsonl({argument}=...): the folder {place} has no {' or '.join(names)}; give the file "
        "itself if it has another name."
    )


def _read(path: Path, text: str, label: str, text_pair: str | None, regression: bool) -> _Texts:
    texts: list[str] = []
    pairs: list[str] | None = None if text_pair is None else []
    labels: list[Any] = []
    lines: list[int] = []
    # str.splitlines would also break at separators that are legal inside a JSON string.
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: not JSON ({error}); every line must be one object such as "
                f'{{"{text}": "...", "{label}": 0}}.'
            ) from error
        if not isinstance(row, dict):
            raise UsageError(
                f'{where}: a line must be an object such as {{"{text}": "...", "{label}": 0}}, '
                f"got {type(row).__name__}."
            )
        texts.append(_text(row, text, where))
        if pairs is not None and text_pair is not None:
            pairs.append(_text(row, text_pair, where))
        labels.append(_label(row, label, regression, where))
        lines.append(number)
    return _Texts(path, texts, pairs, labels, lines)


def _value(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        found = ", ".join(repr(name) for name in row) or "none"
        raise UsageError(f"{where}: the key {key!r} is missing; the line has {found}.")
    return row[key]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = _value(row, key, where)
    if not isinstance(value, str):
        raise UsageError(f"{where}: {key!r} must be a string, got {value!r}.")
    return value


def _label(row: dict[str, Any], key: str, regression: bool, where: str) -> int | str | float:
    value = _value(row, key, where)
    if isinstance(value, bool):
        raise UsageError(f"{where}: {key!r} is {value!r}; write 0 or 1 instead.")
    if regression:
        limit = torch.finfo(torch.float32).max
        if not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > limit:
            raise UsageError(f"{where}: {key!r} must be a finite number, got {value!r}.")
    elif not isinstance(value, int | str):
        raise UsageError(
            f"{where}: {key!r} must be an integer or a string, got {value!r}. To predict a "
            "number, set regression to true."
        )
    return value
