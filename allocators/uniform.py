"""Uniform: every row gets the same number of directions.

The plain baseline that every other rule is measured against.

Cost: nothing beside the queries themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from fwdlearn.allocator import Allocator, Plan
from fwdlearn.counts import check_counts, check_sharing, sharing_rows
from fwdlearn.keys import Key


@dataclass(frozen=True)
class Uniform(Allocator):
    """The same number of directions for every row.

    Args:
        directions: directions of each row, at least 1.
        sharing: "private" (each row has its own directions: the least variance at equal cost
            while rows agree), "shared" (one set for the batch), or how many consecutive rows
            share a set, at least 1.

    Example:
        >>> plan, _ = Uniform(2, "shared").allocate(3, {}, None, key=Key.root(0))
        >>> plan.direction.tolist()
        [0, 1, 0, 1, 0, 1]
    """

    directions: int = 4
    sharing: str | int = "private"

    def __post_init__(self) -> None:
        check_counts("Uniform", self.directions)
        check_sharing("Uniform", self.sharing)

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        return Plan.uniform(rows, self.directions, sharing_rows(self.sharing, rows)), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(directions=3, sharing="shared"), cls(directions=2, sharing=2)]
