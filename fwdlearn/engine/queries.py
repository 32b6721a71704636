"""A block of queries, as the rungs pass it around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine.dropout import KeyedDropout
from fwdlearn.keys import Key


@dataclass(frozen=True)
class Queries:
    """Query j is row `row[j]` at `scale[j]` times direction `direction[j]`.

    Args:
        batch: the rows to choose from.
        row: int64 [queries].
        directions: the family.
        direction: int64 [queries].
        scale: float64 [queries].
        dropout: names the dropout masks, or None where nothing drops out.
        group: so many consecutive queries share their direction and scale, throughout.
    """

    batch: Batch
    row: Tensor
    directions: Directions
    direction: Tensor
    scale: Tensor
    dropout: Key | None = None
    group: int = 1

    def __len__(self) -> int:
        return len(self.row)

    def at(self, index: Tensor | slice) -> Queries:
        """Some of the queries, each as a group of its own."""
        row, direction, scale = self.row[index], self.direction[index], self.scale[index]
        return replace(self, row=row, direction=direction, scale=scale, group=1)

    def points(self) -> list[tuple[int, float, Tensor]]:
        """For each perturbed point: direction, scale, and its queries (int64, ascending)."""
        pairs = torch.stack((self.direction.double(), self.scale), dim=1)
        distinct, member, counts = torch.unique(
            pairs, dim=0, return_inverse=True, return_counts=True
        )
        members = member.argsort(stable=True).split(counts.tolist())
        return [
            (int(direction), scale, mine)
            for (direction, scale), mine in zip(distinct.tolist(), members, strict=True)
        ]

    def inputs(self) -> Batch:
        """The rows, one for each query."""
        return self.batch.select(self.row)

    def masks(self) -> AbstractContextManager[object]:
        """Within, dropout is the same for all queries of a row."""
        return masks(self.dropout, self.row)

    def together(self) -> tuple[Queries, Tensor | None]:
        """The queries with those at one point side by side, and their order if it is another."""
        # On the host, once for all blocks: sizes decide what runs.
        direction, scale = self.direction.cpu(), self.scale.cpu()
        order = torch.argsort(scale, stable=True)
        order = order[torch.argsort(direction[order], stable=True)]
        direction, scale = direction[order], scale[order]
        new = (direction[1:] != direction[:-1]) | (scale[1:] != scale[:-1])
        starts = torch.nonzero(new).flatten() + 1
        points = len(starts) + 1
        if points == len(self):
            return self, None
        group, rest = divmod(len(self), points)
        if rest or not torch.equal(starts, torch.arange(group, len(self), group)):
            group = 1
        order = order.to(self.row.device)
        return replace(self.at(order), group=group), order

    def blocks(self, size: int) -> Iterator[Queries]:
        """Blocks of at most `size` queries and much the same size, each of whole groups."""
        unit = self.group if self.group <= size else 1
        units = len(self) // unit
        count = -(-units // (size // unit))
        edges = [unit * (units * number // count) for number in range(count + 1)]
        if unit < self.group:
            # No block may cross from one group into the next.
            edges = sorted({*edges, *range(0, len(self), self.group)})
        for start, stop in zip(edges, edges[1:], strict=False):
            group = self.group if unit == self.group else stop - start
            yield replace(self.at(slice(start, stop)), group=group)

    @cached_property
    def repeats(self) -> Repeats | None:
        """How the rows recur, or None where most of them do not."""
        row = self.row.cpu()
        rows, inverse = torch.unique(row, return_inverse=True)
        if 2 * len(rows) > len(row):
            return None
        first = torch.full_like(rows, len(row))
        first.scatter_reduce_(0, inverse, torch.arange(len(row)), "amin")
        return Repeats(first.to(self.row.device), inverse.to(self.row.device))


@dataclass(frozen=True)
class Repeats:
    """Queries of the same row: query j sees the row of query `first[inverse[j]]`."""

    first: Tensor
    inverse: Tensor


def masks(key: Key | None, row: Tensor) -> AbstractContextManager[object]:
    """Dropout masks named by `key` and the rows, or torch's own where there is no key."""
    return nullcontext() if key is None else KeyedDropout(key, row)
