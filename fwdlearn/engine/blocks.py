"""How many rows go through the model at once.

Enough to keep the device busy, and within memory. The number is
a function of shapes and settings, so that runs repeat exactly; only where free memory is shorter
than that does the machine decide.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.engine.footprint import Footprint, footprint
from fwdlearn.engine.queries import Queries
from fwdlearn.engine.room import Room
from fwdlearn.errors import UsageError
from fwdlearn.memory import free_bytes

# The widest activation of a block: what keeps matrix products at full speed, on a CPU and a GPU.
_WIDEST_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
# The share of free memory that a block may take where no budget is given.
_SHARE = 0.5


class Blocks:
    """Sizes of blocks, one for each kind of pass and each shape of a row.

    Args:
        budget: bytes that a pass may take at its peak, or None for a size that keeps the device
            busy.
        room: makes them smaller where memory has run out.
    """

    def __init__(self, budget: int | None = None, room: Room | None = None) -> None:
        self.budget, self.room = budget, room or Room()
        self._known: dict[Hashable, tuple[Footprint, int]] = {}

    @property
    def peak(self) -> int:
        """Bytes of the largest block so far."""
        return max((taken.bytes(rows) for taken, rows in self._known.values()), default=0)

    def plain(
        self, batch: Batch, run: Callable[[Tensor], object], widest: int, kind: str = "plain"
    ) -> int:
        """Rows of a pass that is no different from one query to the next.

        Args:
            batch: rows like those to come.
            run: the pass, over the rows int64 [count] of the batch.
            widest: bytes of the widest activation of one row, or of what is kept of it.
            kind: which pass it is.
        """

        def some(count: int) -> object:
            return run(torch.arange(count, device=batch.device) % len(batch))

        return self._rows(batch, kind, lambda: [footprint(some, batch.device)], widest)

    def perturbed(self, queries: Queries, run: Callable[[Queries], object], widest: int) -> int:
        """Queries of a perturbed pass; see `plain`.

        Args:
            queries: those to come; how rows and directions recur in them decides what is made.
            run: the pass, over queries like them.
            widest: bytes of the widest activation of one row.
        """
        batch, family = queries.batch, queries.directions
        grouped, repeated = queries.group > 1, queries.repeats is not None

        def some(count: int, shared: bool) -> object:
            number = torch.arange(count, device=batch.device)
            row = number // (2 if repeated and not shared else 1) % len(batch)
            direction = number * 0 if shared else number % family.count
            scale = queries.scale[:1].expand(count)
            group = count if shared else 1
            return run(replace(queries, row=row, direction=direction, scale=scale, group=group))

        def measure() -> list[Footprint]:
            # What is made once for the whole family belongs to no block.
            some(1, False)
            # Queries that share a direction take less than those that do not, but for what a
            # direction is written out into.
            ways = (False, True) if grouped else (False,)
            return [footprint(partial(some, shared=way), batch.device) for way in ways]

        kind = (family.law, family.rank, family.expanded is None, grouped, repeated)
        return self._rows(batch, kind, measure, widest)

    def _rows(
        self, batch: Batch, kind: Hashable, measure: Callable[[], list[Footprint]], widest: int
    ) -> int:
        values = (*batch.args, *batch.kwargs.values(), batch.targets)
        key = (kind, tuple((value.shape[1:], value.dtype) for value in values))
        if key not in self._known:
            taken = Footprint.highest(measure())
            self._known[key] = taken, self._fitting(taken, widest, batch.device)
        return self.room.of(self._known[key][1])

    def _fitting(self, taken: Footprint, widest: int, device: torch.device) -> int:
        if self.budget is not None:
            rows = taken.rows(self.budget)
            if not rows:
                raise UsageError(
                    f"memory_budget={self.budget} is too little: one row takes "
                    f"{taken.bytes(1)} bytes. Raise it, shorten the rows, or leave it out."
                )
            return rows
        rows = _WIDEST_BYTES.get(device.type, 2**28) // max(1, widest)
        free = free_bytes(str(device))
        if free is not None:
            rows = min(rows, taken.rows(int(_SHARE * free)))
        return max(1, rows)
