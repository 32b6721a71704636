"""From scores to whole numbers of directions, and the settings that allocators have in common."""

from __future__ import annotations

import torch
from torch import Tensor


def divide(score: Tensor, total: int, least: int = 1) -> Tensor:
    """Counts in proportion to a score, none below `least`, by largest remainder.

    The real-valued solution is `max(least, factor * score)` with the factor that spends the total,
    which minimises the sum of `score^2 / count`. A score that is negative or not finite counts as
    zero; where all are zero the parts are equal.

    Args:
        score: float [rows].
        total: the sum of the counts, at least `least * rows`.
        least: of each count, at least 0.

    Returns:
        int64 [rows].

    Example:
        >>> divide(torch.tensor([1.0, 0.0, 3.0]), 9).tolist()
        [2, 1, 6]
    """
    rows = len(score)
    if total < least * rows:
        raise ValueError(f"divide: {rows} rows of at least {least} take more than {total}.")
    score = score.detach().cpu().double()
    score = torch.where(score.isfinite() & (score > 0), score, 0.0)
    top = score.max()
    score = score / top if top > 0 else torch.ones_like(score)
    ascending = score.sort().values
    above = ascending.flip(0).cumsum(0).flip(0)
    # With the j smallest at the floor, this is what a unit of the others' score gets.
    factors = (total - least * torch.arange(rows)) / above
    fits = factors * ascending >= least
    factor = factors[int(fits.long().argmax())] if fits.any() else torch.tensor(0.0).double()
    wanted = (factor * score).clamp(min=least)
    counts = (wanted + 1e-9).floor().long()
    left = total - int(counts.sum())
    # Rounding may leave one too few or too many; whole rounds only where all are at the floor.
    counts += left // rows
    order = (wanted - counts).argsort(descending=True, stable=True)
    counts[order[: left % rows]] += 1
    return counts


def check_sharing(owner: str, sharing: str | int) -> None:
    """Raises ValueError, naming `owner`, unless `sharing` says how rows share directions."""
    if isinstance(sharing, str):
        valid = sharing in ("private", "shared")
    else:
        valid = sharing >= 1 and not isinstance(sharing, bool)
    if not valid:
        raise ValueError(
            f"{owner}(sharing=...) must be 'private', 'shared' or a number of rows of at "
            f"least 1, got {sharing!r}."
        )


def sharing_rows(sharing: str | int, rows: int) -> int:
    """How many consecutive rows share a set of directions, as a `Plan` wants it."""
    return {"private": 1, "shared": rows}[sharing] if isinstance(sharing, str) else sharing


def check_counts(owner: str, directions: int, least: int = 1) -> None:
    """Raises ValueError, naming `owner`, unless each row can have at least `least` directions."""
    if isinstance(directions, bool) or directions < 1:
        raise ValueError(f"{owner}(directions=...) must be at least 1, got {directions}.")
    if isinstance(least, bool) or not 1 <= least <= directions:
        raise ValueError(
            f"{owner}(least=...) must lie between 1 and directions={directions}, got {least}."
        )
