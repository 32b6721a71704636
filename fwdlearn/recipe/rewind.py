"""A run whose numbers have gone wrong, taken back to its last good step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fwdlearn.ledger import snapshots
from fwdlearn.ledger.journal import SNAPSHOTS
from fwdlearn.recipe.replay import Rebuilt, ledger_of, replay


def last_good(losses: Sequence[float], window: int) -> int:
    """After how many steps the weights were good for the last time.

    A loss is good as far as halfway between the first and the lowest mean of `window` losses in a
    row, or if it is no higher than the first where there is no lower mean.

    Args:
        losses: of each step, before its update.
        window: steps of a mean, at least 1.

    Example:
        >>> last_good([2.0, 1.0, 1.2, 1.8, 40.0, float("nan")], 2)
        2
        >>> last_good([2.0, 90.0], 2)
        0
    """
    if not losses:
        return 0
    means = (
        math.fsum(losses[i : i + window]) / window
        for i in range(max(1, len(losses) - window + 1))
        if all(map(math.isfinite, losses[i : i + window]))
    )
    level = min(losses[0], (losses[0] + min(means, default=losses[0])) / 2)
    return max((step for step, loss in enumerate(losses) if loss <= level), default=0)


def rewind(run: Path, window: int) -> tuple[int, Rebuilt | None]:
    """The last good step of a run, and the run as it was then.

    Args:
        run: its folder.
        window: as `last_good` takes it.

    Returns:
        The step; None beside it where the way back would take more forward passes than a run makes
        between two snapshots.

    Raises:
        FwdlearnError: as `replay`.
    """
    ledger = ledger_of(run)
    begun = ledger.header.get("parent", {"step": 0})["step"]
    step = max(begun, last_good([float(record.loss) for record in ledger], window))
    kept = [at for at, _ in snapshots.in_folder(run / SNAPSHOTS)]
    told = all(record.coefficients is not None for record in ledger)
    passes = step - max((at for at in kept if at <= step), default=begun)
    if told or passes <= ledger.steps - min(kept, default=begun):
        return step, replay(run, step)
    return step, None
