"""Time series in tables: one time a line, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fwdlearn.data.csv import read_table, target_numbers
from fwdlearn.data.files import existing_file
from fwdlearn.data.series import forecast_data, split_at
from fwdlearn.data.types import Data
from fwdlearn.errors import UsageError


def csv_series(
    path: str | Path,
    target: str,
    ahead: int = 1,
    steps: int = 40,
    washout: int = 10,
    features: Sequence[str] | None = None,
    evaluation_fraction: float = 0.25,
    delimiter: str = ",",
) -> Data:
    """Loads a table whose lines are times, for forecasts of one of its columns.

    The training times come first, the evaluation times after them; no value of one is input or
    target of the other, and everything is scaled by the mean and deviation of the training times
    alone: nothing of the future leaks into the past.

    Args:
        path: the file, UTF-8, with a line that names the columns.
        target: the column to forecast; its past is an input too.
        ahead: times between input and target, at least 1.
        steps: of a window, more than `washout`.
        washout: steps at the beginning of a window that are not counted, at least 0.
        features: other columns to read, all numeric, or none of them with []; None takes all.
        evaluation_fraction: share of the times, the last ones, above 0 and below 1.
        delimiter: between fields, one character.

    Returns:
        Windows of inputs float32 [steps, columns], the target's column last, and targets float32
        [steps, 1] in training deviations, NaN where not counted. Training windows begin at every
        time, evaluation windows every `steps - washout`, so that each time is counted once.

    Raises:
        MissingError: no such file.
        UsageError: anything wrong in the file, as `file:line`, or an argument is out of range.
    """
    if len(delimiter) != 1:
        raise UsageError(f"csv_series(delimiter=...) must be one character, got {delimiter!r}.")
    file = existing_file(path, "csv_series(path=...)", "a table with a header")
    table = read_table(file, target, features, delimiter, alone=True)
    values = target_numbers(table, target)
    inputs = torch.cat((table.features, values), 1)
    argument = "csv_series(evaluation_fraction=...)"
    split = split_at(len(values), evaluation_fraction, argument)
    return forecast_data("csv_series", inputs, values, split, ahead, steps, washout)
