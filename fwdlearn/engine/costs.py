"""What the two ways of perturbing a product cost, and which is cheaper.

With k tokens at one point, a matrix of m x n can be perturbed in the output, at a read of the
input and a write of the output for every token, or in a temporary copy of the matrix, at a sweep
over it for every point; several points then take as many smaller products. The constants are
nanoseconds a number, measured on two cores with AVX2; only their ratios matter, and those are
ratios of memory traffic. They are fixed and not measured anew at each start: a run that chooses by
a clock does not repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Costs:
    """Nanoseconds.

    Args:
        read: a number of the input, multiplied and summed.
        write: a number of the output, multiplied and added.
        copy: a number of the matrix, perturbed into a copy.
        split: a number of the matrix, for a product of its own at each of several points.
        call: a point, for what starts its two operations.
    """

    read: float
    write: float
    copy: float
    split: float
    call: float

    def copy_pays(self, points: int, k: int, n: int, m: int) -> bool:
        """Whether temporary matrices [n, m] are cheaper for k tokens each than correcting."""
        each = self.copy + (self.split if points > 1 else 0)
        return k * (self.read * n + self.write * m) > each * n * m + self.call


COSTS = {
    "cpu": Costs(0.065, 0.12, 0.115, 0.5, 15_000),
    "cuda": Costs(0.001, 0.002, 0.002, 0.002, 10_000),
}


def copy_pays(x: torch.Tensor, m: int) -> bool:
    """Whether products of `x` [points, k, n] with matrices [n, m] had better be perturbed first.

    Never in short dtypes, where a matrix plus a small change rounds back to the matrix.
    """
    costs = COSTS.get(x.device.type)
    wide = x.dtype in (torch.float32, torch.float64)
    return wide and costs is not None and costs.copy_pays(len(x), x.shape[1], x.shape[2], m)
