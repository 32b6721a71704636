"""Who gets how many queries: the Allocator interface and the Plan that it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fwdlearn.errors import NonFiniteError
from fwdlearn.keys import Key

State = Any


@dataclass(frozen=True)
class Plan:
    """Which rows get which directions, with which weight.

    Counts become the weights `1 / (rows * count)`, so the estimate is the mean over rows of each
    row's own mean: an allocation changes the variance and never the objective.

    Args:
        counts: int64 [rows], directions of each row, at least 1.
        sharing: how many consecutive rows use the same directions: 1 is private to a row,
            `rows` or more is shared by the batch.

    Example:
        >>> plan = Plan(torch.tensor([2, 1]))
        >>> plan.row.tolist(), plan.direction.tolist(), plan.weight.tolist()
        ([0, 0, 1], [0, 1, 2], [0.25, 0.25, 0.5])
    """

    counts: Tensor
    sharing: int = 1

    def __post_init__(self) -> None:
        if self.counts.dtype != torch.int64 or self.counts.dim() != 1 or not len(self.counts):
            raise ValueError(
                "Plan(counts) must be int64 [rows] with at least one row, got "
                f"{self.counts.dtype} {tuple(self.counts.shape)}."
            )
        if int(self.counts.min()) < 1:
            raise ValueError(f"Plan(counts) must be at least 1, got {int(self.counts.min())}.")
        if self.sharing < 1:
            raise ValueError(f"Plan(sharing) must be at least 1, got {self.sharing}.")

    @classmethod
    def uniform(cls, rows: int, directions: int, sharing: int = 1) -> Plan:
        """The same number of directions for every row."""
        return cls(torch.full((rows,), directions), sharing)

    @property
    def rows(self) -> int:
        return len(self.counts)

    def __len__(self) -> int:
        """How many (row, direction) pairs there are."""
        return len(self.row)

    @cached_property
    def row(self) -> Tensor:
        """int64 [pairs], ascending."""
        return torch.repeat_interleave(torch.arange(self.rows), self.counts)

    @cached_property
    def direction(self) -> Tensor:
        """int64 [pairs]: the numbers of the directions, without gaps."""
        group = torch.arange(self.rows) // self.sharing
        widest = torch.zeros(int(group[-1]) + 1, dtype=torch.int64)
        widest.scatter_reduce_(0, group, self.counts, "amax")
        first = widest.cumsum(0) - widest
        position = torch.arange(len(self.row)) - (self.counts.cumsum(0) - self.counts)[self.row]
        return first[group[self.row]] + position

    @cached_property
    def directions(self) -> int:
        """How many different directions there are."""
        return int(self.direction.max()) + 1

    @cached_property
    def weight(self) -> Tensor:
        """float64 [pairs]: 1 / (rows * count of the pair's row). Sums to 1."""
        return 1.0 / (self.rows * self.counts[self.row].double())

    def finite(self, valid: Tensor, least: int = 1) -> tuple[Tensor, int]:
        """Weights that leave out the pairs whose loss was not finite.

        The weights of a row's other pairs grow so that each remaining row counts the same.

        Args:
            valid: bool [pairs].
            least: pairs that a row needs to be of use.

        Returns:
            float64 [pairs] that sum to 1, zero for what is left out, and how many invalid there
            were.

        Raises:
            NonFiniteError: fewer than half of the pairs remain.
        """
        dropped = int((~valid).sum())
        if not dropped:
            return self.weight, 0
        row = self.row
        left = torch.zeros(self.rows, dtype=torch.float64, device=row.device)
        left.index_add_(0, row, valid.double())
        kept = valid & (left[row] >= least)
        if 2 * int(kept.sum()) < len(self):
            raise NonFiniteError(
                f"{dropped} of {len(self)} queries gave a loss that is not finite; lower the "
                "learning rate or sigma, or look for rows that overflow."
            )
        rows = (left >= least).sum()
        return torch.where(kept, 1.0 / (rows * left[row].clamp(min=1)), 0.0), dropped

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with its index vectors on `device`."""
        if self.counts.device == torch.device(device):
            return self
        moved = Plan(self.counts, self.sharing)
        for name in ("row", "direction", "weight"):
            # Worked out here, so that arithmetic and order are those of the CPU everywhere.
            moved.__dict__[name] = getattr(self, name).to(device)
        moved.__dict__["directions"] = self.directions
        return moved


class Allocator(ABC):
    """Divides the queries of a step among its rows.

    Settings are frozen data; what must last from step to step is the state, which goes in and
    comes out. An allocator spends `directions` directions a row on average, exactly, and knows
    no estimator.

    Attributes:
        signals: names of the per-row signals that it reads, such as "loss".
        directions: mean number of directions a row.
    """

    signals: ClassVar[frozenset[str]] = frozenset()
    directions: int

    def init(self) -> State:
        """The state before the first step."""
        return None

    @abstractmethod
    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: State, *, key: Key
    ) -> tuple[Plan, State]:
        """The plan of one step.

        Args:
            rows: how many rows the batch has.
            signals: what `self.signals` asked for, each float [rows].
            state: from `init` or the last call.
            key: names all randomness.
        """

    @classmethod
    @abstractmethod
    def examples(cls) -> list[Self]:
        """Instances for `fwdlearn.testing.check_allocator`."""
