"""Windows of a long series: what came is the input, what comes later is the target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.data.fresh import check_counts
from fwdlearn.data.types import Data, DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.objectives import NOT_COUNTED


@dataclass(frozen=True)
class Windows:
    """Row i is `steps` consecutive times of a series, from `stride` times i.

    Args:
        inputs: [times, ...].
        targets: [times, ...], what is asked at each time.
        steps: of a row, at least 1.
        stride: between the beginnings of rows, at least 1.
        washout: steps at the beginning of a row that are not counted.
    """

    inputs: Tensor
    targets: Tensor
    steps: int
    stride: int = 1
    washout: int = 0

    def __len__(self) -> int:
        return max(0, (len(self.inputs) - self.steps) // self.stride + 1)

    def batch(self, index: Tensor) -> Batch:
        times = index.unsqueeze(1) * self.stride + torch.arange(self.steps)
        targets = self.targets[times]
        targets[:, : self.washout] = torch.nan if targets.is_floating_point() else NOT_COUNTED
        return Batch((self.inputs[times],), targets)


def split_at(times: int, fraction: float, argument: str) -> int:
    """The first evaluation time, where the last `fraction` of the times is for evaluation.

    Raises:
        UsageError: the fraction is out of range; `argument` is what the user calls it.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"{argument} must be above 0 and below 1, got {fraction!r}.")
    return times - round(fraction * times)


def forecast_data(
    owner: str, inputs: Tensor, values: Tensor, split: int, ahead: int, steps: int, washout: int
) -> Data:
    """Windows for forecasts, scaled by the mean and deviation of the training times alone.

    Args:
        owner: what the user calls it, for messages.
        inputs: float64 [times, features].
        values: float64 [times, values], to be forecast.
        split: the first evaluation time. No window has inputs or targets on both sides of it.
        ahead, steps, washout: see `fwdlearn.data.mackey_glass`.

    Raises:
        UsageError: a setting is out of range, or too few times are left for a window.
    """
    check_counts(owner, ahead=ahead, steps=steps)
    if not 0 <= washout < steps:
        raise UsageError(
            f"{owner}(washout=...) must be at least 0 and less than steps={steps}, got {washout!r}."
        )

    def scaled(series: Tensor) -> Tensor:
        mean, deviation = series[:split].mean(0), series[:split].std(0, correction=0)
        # A column that never varies carries nothing; dividing by its deviation would give NaN.
        deviation[deviation <= 1e-12 * mean.abs()] = 1.0
        return ((series - mean) / deviation).float()

    inputs, values = scaled(inputs), scaled(values)
    parts = {"training": slice(0, split), "evaluation": slice(split, len(inputs))}
    made = []
    for name, part in parts.items():
        stride = 1 if name == "training" else steps - washout
        windows = Windows(inputs[part][:-ahead], values[part][ahead:], steps, stride, washout)
        if not len(windows):
            raise UsageError(
                f"{owner}: {len(inputs[part])} {name} times hold no window of steps={steps} with "
                f"targets {ahead} later; give a longer series, fewer steps, or another "
                "evaluation_fraction."
            )
        made.append(windows)
    shape = (steps, inputs.shape[1])
    info = DataInfo("sequence", shape, None, values=values.shape[1], per_step=True)
    return Data(info, *made)
