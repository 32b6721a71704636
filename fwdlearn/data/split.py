"""Which rows are held out: a pure function of the labels, the fraction and the seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fwdlearn.errors import UsageError


def held_out(targets: Tensor, fraction: float, seed: int, argument: str) -> tuple[Tensor, Tensor]:
    """Splits rows in two, each class in the same proportion.

    Args:
        targets: int64 [rows] class numbers; anything else is split as one class.
        fraction: share of the second part, above 0 and below 1.
        seed: of the shuffle; no global generator is read or moved.
        argument: what the caller calls `fraction`, for the message.

    Returns:
        Two int64 index vectors in ascending order. Both hold at least one row.

    Raises:
        UsageError: the fraction is out of range or leaves one part empty.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"{argument} must be above 0 and below 1, got {fraction!r}.")
    random = np.random.default_rng(seed)
    classes = targets.numpy() if targets.dtype == torch.int64 else np.zeros(len(targets), int)
    second = np.zeros(len(targets), dtype=bool)
    for label in np.unique(classes):
        rows = random.permutation(np.flatnonzero(classes == label))
        second[rows[: round(fraction * len(rows))]] = True
    if not second.any() or second.all():
        raise UsageError(
            f"{argument}={fraction!r} of {len(targets)} rows leaves one part empty; give more "
            "rows or another fraction."
        )
    return torch.from_numpy(np.flatnonzero(~second)), torch.from_numpy(np.flatnonzero(second))


def limited(rows: int, limit: int | None, argument: str) -> Tensor:
    """At most `limit` of `rows` rows, evenly spaced, so that a sorted file keeps all its classes.

    Returns:
        An int64 index vector in ascending order.
    """
    if limit is None or limit >= rows:
        return torch.arange(rows)
    if limit < 1:
        raise UsageError(f"{argument} must be at least 1, got {limit!r}.")
    return torch.arange(limit) * rows // limit
