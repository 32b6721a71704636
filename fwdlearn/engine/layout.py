"""How queries for slopes are laid out: passes in which every row has as many directions.

The plain values of a row serve all its directions in a pass, and nothing is padded: rows with
equally many queries run together, and a row with too many for one pass runs in several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlopePass:
    """One forward pass.

    Args:
        row: int64 [rows], rows of the batch.
        query: int64 [K, rows], which queries it answers.
        direction: int64 [K] where all rows share their directions, else [K, rows].
    """

    row: Tensor
    query: Tensor
    direction: Tensor


def slope_passes(row: Tensor, direction: Tensor, size: int, private: bool) -> Iterator[SlopePass]:
    """The passes that answer all queries.

    Args:
        row: int64 [queries].
        direction: int64 [queries].
        size: rows of a pass at most, each counted once and once more for each of its directions.
        private: whether rows of one pass may have different directions.
    """
    device = row.device
    # On the host: counts decide what runs.
    row, direction = row.cpu(), direction.cpu()
    order = torch.argsort(direction, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    rows, counts = torch.unique_consecutive(row[order], return_counts=True)
    queries = order.split(counts.tolist())
    kinds: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, mine in enumerate(queries):
        kinds[(len(mine),) if private else tuple(direction[mine].tolist())].append(number)
    for members in kinds.values():
        table = torch.stack([queries[number] for number in members])
        for some in _even(table.T, size - 1):
            most = size // (len(some) + 1)
            for mine, query in zip(_even(rows[members], most), _even(some.T, most), strict=True):
                own = direction[query.T]
                shared = bool((own == own[:, :1]).all())
                ids = own[:, 0] if shared else own
                yield SlopePass(mine.to(device), query.T.to(device), ids.to(device))


def _even(value: Tensor, size: int) -> tuple[Tensor, ...]:
    """In parts of at most `size` and much the same length."""
    return value.tensor_split(-(-len(value) // max(1, size)))
