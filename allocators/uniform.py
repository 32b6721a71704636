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
        if isinstance(self.directions, bool) or self.directions < 1:
            raise ValueError(f"Uniform(directions=...) must be at least 1, got {self.directions}.")
        if isinstance(self.sharing, str):
            valid = self.sharing in ("private", "shared")
        else:
            valid = self.sharing >= 1 and not isinstance(self.sharing, bool)
        if not valid:
            raise ValueError(
                "Uniform(sharing=...) must be 'private', 'shared' or a number of rows of at "
                f"least 1, got {self.sharing!r}."
            )

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        named = {"private": 1, "shared": rows}
        sharing = named[self.sharing] if isinstance(self.sharing, str) else self.sharing
        return Plan.uniform(rows, self.directions, sharing), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(directions=3, sharing="shared"), cls(directions=2, sharing=2)]
