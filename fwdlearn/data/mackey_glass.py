"""The Mackey-Glass series: chaotic, smooth, and of a known equation.

Paper: M. Mackey and L. Glass, "Oscillation and chaos in physiological control systems" (Science
197, 1977).

    dx/dt = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x
"""

from __future__ import annotations

import torch
from torch import Tensor

from fwdlearn.data.fresh import check_counts
from fwdlearn.data.series import forecast_data, split_at
from fwdlearn.data.types import Data
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

_DELAY, _PER_TIME, _FORGOTTEN = 17, 10, 500


def mackey_glass(
    ahead: int = 15,
    steps: int = 40,
    washout: int = 17,
    times: int = 6000,
    evaluation_fraction: float = 0.25,
    series_seed: int = 0,
) -> Data:
    """Forecasts of the Mackey-Glass series: at each time, what it will be `ahead` later.

    The training times come first, the evaluation times after them; no value of one is input or
    target of the other. Mean and deviation are those of the training times.

    Args:
        ahead: times between input and target, at least 1.
        steps: of a window, more than `washout`.
        washout: steps at the beginning of a window that are not counted, at least 0; before the
            delay of the equation has passed, the future is not determined by what was seen.
        times: length of the series, one value at each unit of time.
        evaluation_fraction: share of the times, the last ones, above 0 and below 1.
        series_seed: of the beginning of the series.

    Returns:
        Windows of inputs float32 [steps, 1] and targets float32 [steps, 1], NaN where not counted.
        Training windows begin at every time, evaluation windows every `steps - washout`, so that
        each time is counted once.

    Raises:
        UsageError: an argument is out of range, or too few times are left for a window.
    """
    check_counts("mackey_glass", times=times)
    if not 0 <= series_seed < 2**64:
        raise UsageError(
            f"mackey_glass(series_seed=...) must lie in [0, 2**64), got {series_seed}."
        )
    series = _series(times, Key.root(series_seed).fold("mackey_glass")).unsqueeze(1)
    split = split_at(times, evaluation_fraction, "mackey_glass(evaluation_fraction=...)")
    return forecast_data("mackey_glass", series, series, split, ahead, steps, washout)


def _series(times: int, key: Key) -> Tensor:
    """float64 [times], by Runge-Kutta steps of 0.1 with the delayed value held during a step."""
    past = (0.5 + key.uniform(_DELAY * _PER_TIME)).tolist()
    h, x, found = 1 / _PER_TIME, past[-1], []
    for step in range((times + _FORGOTTEN) * _PER_TIME):
        place = step % len(past)
        delayed, past[place] = past[place], x
        gain = 0.2 * delayed / (1 + delayed**10)
        a = gain - 0.1 * x
        b = gain - 0.1 * (x + h / 2 * a)
        c = gain - 0.1 * (x + h / 2 * b)
        d = gain - 0.1 * (x + h * c)
        x += h / 6 * (a + 2 * b + 2 * c + d)
        if step >= _FORGOTTEN * _PER_TIME and step % _PER_TIME == 0:
            found.append(x)
    return torch.tensor(found, dtype=torch.float64)
