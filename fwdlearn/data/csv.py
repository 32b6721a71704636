"""Tables: one row a line, a header, numeric columns and a target."""

from __future__ import annotations

import csv as reader
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from fwdlearn.data.files import existing_file, text_of
from fwdlearn.data.labels import Label, class_numbers, class_order
from fwdlearn.data.split import held_out
from fwdlearn.data.types import Data, DataInfo, Rows
from fwdlearn.errors import UsageError


@dataclass(frozen=True)
class Table:
    """Features float64 [rows, columns], the target as text, and the line of each row."""

    path: Path
    columns: tuple[str, ...]
    features: Tensor
    target: list[str]
    lines: list[int]

    def where(self, row: int) -> str:
        return f"{self.path}:{self.lines[row]}"


def csv(
    path: str | Path,
    target: str,
    evaluation_path: str | Path | None = None,
    evaluation_fraction: float | None = None,
    features: Sequence[str] | None = None,
    regression: bool = False,
    standardise: bool = True,
    delimiter: str = ",",
    split_seed: int = 0,
) -> Data:
    """Loads a table whose first line names the columns.

    Args:
        path: the file, UTF-8.
        target: the column to predict.
        evaluation_path: another file with the same columns, for evaluation.
        evaluation_fraction: share of the rows held out for evaluation, above 0 and below 1.
        features: the columns to read, all numeric; None takes every column but the target.
        regression: the target is a number to predict and not a class.
        standardise: bring every feature to mean 0 and deviation 1, measured on the training rows
            only, so that nothing of the evaluation rows leaks.
        delimiter: between fields, one character.
        split_seed: of the split alone.

    Raises:
        MissingError: no such file.
        UsageError: anything wrong in the file, as `file:line`.
    """
    if evaluation_path is not None and evaluation_fraction is not None:
        raise UsageError("csv: give evaluation_path or evaluation_fraction, not both.")
    if len(delimiter) != 1:
        raise UsageError(f"csv(delimiter=...) must be one character, got {delimiter!r}.")
    file = existing_file(path, "csv(path=...)", "a table with a header")
    table = read_table(file, target, features, delimiter)
    other = None
    if evaluation_path is not None:
        expected = "a table with the same columns"
        file = existing_file(evaluation_path, "csv(evaluation_path=...)", expected)
        other = read_table(file, target, table.columns, delimiter)
    if regression:
        info = DataInfo("features", (len(table.columns),), None)
        targets = target_numbers(table, target).float()
        other_targets = None if other is None else target_numbers(other, target).float()
    else:
        labels = _labels(table)
        order = class_order(labels, f"{table.path}: column {target!r}")
        info = DataInfo("features", (len(table.columns),), len(order), tuple(map(str, order)))
        targets = class_numbers(labels, order, table.where)
        if other is not None:
            if isinstance(order[0], int):
                other_targets = class_numbers(_labels(other), order, other.where)
            else:
                other_targets = class_numbers(other.target, order, other.where)
    train, inputs = torch.arange(len(targets)), table.features
    if evaluation_fraction is not None:
        argument = "csv(evaluation_fraction=...)"
        train, test = held_out(targets, evaluation_fraction, split_seed, argument)
    mean, deviation = inputs[train].mean(0), inputs[train].std(0, correction=0)
    # A column that never varies carries nothing; dividing by its deviation would give NaN.
    deviation[deviation <= 1e-12 * mean.abs()] = 1.0

    def rows(features: Tensor, targets: Tensor) -> Rows:
        scaled = (features - mean) / deviation if standardise else features
        return Rows(scaled.to(torch.float32), targets)

    if other is not None and other_targets is not None:
        return Data(info, rows(inputs, targets), rows(other.features, other_targets))
    if evaluation_fraction is not None:
        held = rows(inputs[test], targets[test])
        return Data(info, rows(inputs[train], targets[train]), held)
    return Data(info, rows(inputs, targets))


def read_table(
    path: Path,
    target: str,
    features: Sequence[str] | None,
    delimiter: str,
    alone: bool = False,
) -> Table:
    """Reads a table; see `csv` for the arguments and what is raised.

    Args:
        alone: whether the target may be the only column.
    """
    lines = reader.reader(io.StringIO(text_of(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(lines)]
        columns = _columns(path, header, target, features, alone)
        place = {name: header.index(name) for name in (*columns, target)}
        values: list[list[float]] = []
        targets: list[str] = []
        numbers: list[int] = []
        for fields in lines:
            where = f"{path}:{lines.line_num}"
            if not fields:
                continue
            if len(fields) != len(header):
                raise UsageError(
                    f"{where}: {len(fields)} fields, the header names {len(header)}; every line "
                    "must have one field for each column."
                )
            values.append([_number(fields[place[name]], name, where) for name in columns])
            targets.append(fields[place[target]].strip())
            numbers.append(lines.line_num)
            if not targets[-1]:
                raise UsageError(f"{where}: the target {target!r} is empty; remove the line.")
    except reader.Error as error:
        raise UsageError(
            f"{path}:{lines.line_num}: not a readable table ({error}); check quotes and delimiter."
        ) from error
    if not values:
        raise UsageError(f"{path}: only a header and no rows; it must hold at least one row.")
    return Table(path, columns, torch.tensor(values, dtype=torch.float64), targets, numbers)


def _columns(
    path: Path, header: list[str], target: str, features: Sequence[str] | None, alone: bool
) -> tuple[str, ...]:
    """The feature columns, once the header is known to name each of them exactly once."""
    for name in header:
        if header.count(name) > 1:
            raise UsageError(f"{path}:1: the column {name!r} is named twice; names must differ.")
    for name in (target, *(features or ())):
        if name not in header:
            close = get_close_matches(name, header, n=1)
            nearest = f" Did you mean {close[0]!r}?" if close else ""
            shown = ", ".join(header[:20])
            raise UsageError(f"{path}:1: there is no column {name!r} in {shown}.{nearest}")
    columns = tuple(name for name in header if name != target) if features is None else features
    if not (columns or alone) or target in columns:
        raise UsageError(
            f"{path}:1: the features must be {'' if alone else 'one or more '}columns other than "
            f"the target {target!r}, got {', '.join(columns) or 'none'}."
        )
    return tuple(columns)


def _number(field: str, column: str, where: str) -> float:
    try:
        value = float(field)
    except ValueError as error:
        raise UsageError(
            f"{where}: column {column!r} must hold numbers, got {field!r}. Correct it, or choose "
            "the numeric columns with features=[...]."
        ) from error
    if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
        raise UsageError(
            f"{where}: column {column!r} must hold finite numbers, got {field!r}; fill the value "
            "or remove the line."
        )
    return value


def target_numbers(table: Table, target: str) -> Tensor:
    """Targets of a regression, float64 [rows, 1]."""
    rows = [_number(field, target, table.where(i)) for i, field in enumerate(table.target)]
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1)


def _labels(table: Table) -> list[Label]:
    """Class names, as whole numbers if all of them are: then 10 comes after 9."""
    try:
        return [int(field) for field in table.target]
    except ValueError:
        return list(table.target)
