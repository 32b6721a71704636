"""Texts with labels, one JSON object a line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwdlearn.data.labels import class_numbers, class_order
from fwdlearn.data.lines import Files, Line, objects
from fwdlearn.data.types import Data, DataInfo, TextRows
from fwdlearn.errors import UsageError


@dataclass(frozen=True)
class _Texts:
    path: Path
    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]
    lines: list[Line]
    targets: Tensor = field(default_factory=lambda: torch.zeros(0))

    def where(self, row: int) -> str:
        return self.lines[row].where

    def rows(self, index: Tensor, max_length: int | None, pad: int) -> TextRows:
        chosen = index.tolist()
        pairs = None if self.pairs is None else [self.pairs[i] for i in chosen]
        texts = [self.texts[i] for i in chosen]
        lines = [int(self.where(i).rpartition(":")[2]) for i in chosen]
        return TextRows(texts, pairs, self.targets[index], str(self.path), lines, max_length, pad)


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
    for argument, value in (("max_length", max_length), ("pad_to_multiple", pad_to_multiple)):
        if value is not None and value < 1:
            raise UsageError(f"jsonl({argument}=...) must be at least 1, got {value!r}.")
    files = Files(
        "jsonl",
        path,
        evaluation_path,
        evaluation_fraction,
        train_rows,
        evaluation_rows,
        split_seed,
    )
    order: tuple[int | str, ...] | None = None

    def read(file: Path) -> _Texts:
        nonlocal order
        rows = _read(file, text, label, text_pair, regression)
        if regression:
            targets = torch.tensor(rows.labels, dtype=torch.float32).unsqueeze(1)
        else:
            # Of the training rows, which are read first.
            order = order or class_order(rows.labels, str(file))
            targets = class_numbers(rows.labels, order, rows.where)
        return replace(rows, targets=targets)

    held, train, other = files.divided(read, lambda rows: rows.targets)
    if order is None:
        info = DataInfo("text", (), None)
    else:
        info = DataInfo("text", (), len(order), tuple(map(str, order)))
    evaluation = None if other is None else other[0].rows(other[1], max_length, pad_to_multiple)
    return Data(info, held.rows(train, max_length, pad_to_multiple), evaluation)


def _read(path: Path, text: str, label: str, text_pair: str | None, regression: bool) -> _Texts:
    lines = list(objects(path, f'{{"{text}": "...", "{label}": 0}}'))
    pairs = None if text_pair is None else [line.text(text_pair) for line in lines]
    labels = [_label(line, label, regression) for line in lines]
    return _Texts(path, [line.text(text) for line in lines], pairs, labels, lines)


def _label(line: Line, key: str, regression: bool) -> int | str | float:
    value, where = line.value(key), line.where
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
