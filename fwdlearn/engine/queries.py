"""A block of queries, as the rungs pass it around."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

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
    """

    batch: Batch
    row: Tensor
    directions: Directions
    direction: Tensor
    scale: Tensor
    dropout: Key | None = None

    def __len__(self) -> int:
        return len(self.row)

    def at(self, index: Tensor | slice) -> Queries:
        """Some of the queries."""
        return replace(
            self, row=self.row[index], direction=self.direction[index], scale=self.scale[index]
        )

    def inputs(self) -> Batch:
        """The rows, one for each query."""
        return self.batch.select(self.row)

    def masks(self) -> AbstractContextManager[object]:
        """Within, dropout is the same for all queries of a row."""
        return masks(self.dropout, self.row)


def masks(key: Key | None, row: Tensor) -> AbstractContextManager[object]:
    """Dropout masks named by `key` and the rows, or torch's own where there is no key."""
    return nullcontext() if key is None else KeyedDropout(key, row)
