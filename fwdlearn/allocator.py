"""Who gets how many queries: the Allocator interface and the Plan that it returns."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.errors import NonFiniteError, UsageError
from fwdlearn.keys import Key

State = Any


@dataclass(frozen=True)
class Block:
    """The parameters that a step perturbs and updates, drawn from a division of them all.

    Args:
        patterns: of parameter names; a parameter belongs to the first one that its name matches.
        number: of the pattern that was drawn.
        probability: with which it was drawn, in (0, 1]; the step's gradient counts 1 over this.
        always: patterns of parameters that every step is about beside its block; they come before
            `patterns`, and count once.
    """

    patterns: tuple[str, ...]
    number: int
    probability: float
    always: tuple[str, ...] = ()

    def stays(self, name: str) -> bool:
        """Whether every step is about that parameter."""
        return any(fnmatch.fnmatchcase(name, one) for one in self.always)

    def factor(self, name: str) -> float:
        """What the gradient of one of its parameters counts."""
        return 1.0 if self.stays(name) else 1 / self.probability

    def names(self, params: Iterable[str]) -> tuple[str, ...]:
        """The block's own and those that are in every step, of all trainable parameters.

        Raises:
            UsageError: a parameter matches no pattern, or a pattern no parameter of its own.
        """
        own: list[list[str]] = [[] for _ in self.patterns]
        every = {name: self.stays(name) for name in params}
        if self.always and not any(every.values()):
            raise UsageError(f"no parameter matches {', '.join(self.always)}; leave it out.")
        for name in (name for name, stays in every.items() if not stays):
            match = (n for n, one in enumerate(self.patterns) if fnmatch.fnmatchcase(name, one))
            place = next(match, None)
            if place is None:
                raise UsageError(
                    f"the parameter {name} matches none of the blocks {', '.join(self.patterns)}; "
                    "add '*' as the last, or set its requires_grad to False."
                )
            own[place].append(name)
        for pattern, names in zip(self.patterns, own, strict=True):
            if not names:
                raise UsageError(
                    f"the block {pattern!r} has no parameter of its own; leave it out."
                )
        return tuple(name for name, stays in every.items() if stays or name in own[self.number])


@dataclass(frozen=True)
class Plan:
    """Which rows get which directions, with which weight.

    Counts become the weights `1 / (rows * count)`, so the estimate is the mean over rows of each
    row's own mean: an allocation changes the variance and never the objective. Two other forms
    have names: `Plan.included`, in which rows go without by chance, and `Plan.pooled`, which does
    change the objective.

    Args:
        counts: int64 [rows], directions of each row, at least 1 where the row has weight.
        sharing: how many consecutive rows use the same directions: 1 is private to a row,
            `rows` or more is shared by the batch.
        row_weight: float64 [rows], what each row's own mean counts; None is `1 / rows` for all.
        block: the parameters that the step is about; None is all of them.

    Example:
        >>> plan = Plan(torch.tensor([2, 1]))
        >>> plan.row.tolist(), plan.direction.tolist(), plan.weight.tolist()
        ([0, 0, 1], [0, 1, 2], [0.25, 0.25, 0.5])
    """

    counts: Tensor
    sharing: int = 1
    row_weight: Tensor | None = None
    block: Block | None = None

    def __post_init__(self) -> None:
        if self.counts.dtype != torch.int64 or self.counts.dim() != 1 or not len(self.counts):
            raise ValueError(
                "Plan(counts) must be int64 [rows] with at least one row, got "
                f"{self.counts.dtype} {tuple(self.counts.shape)}."
            )
        weight, fewest = self.row_weight, int(self.counts.min())
        if weight is None and fewest < 1:
            raise ValueError(
                f"Plan(counts) must be at least 1, got {fewest}; Plan.included is for rows that "
                "go without."
            )
        if weight is not None:
            if weight.shape != self.counts.shape or weight.dtype != torch.float64:
                raise ValueError(
                    f"Plan(row_weight) must be float64 [{self.rows}], got {weight.dtype} "
                    f"{tuple(weight.shape)}."
                )
            if fewest < 0 or not torch.equal(weight > 0, self.counts > 0):
                raise ValueError(
                    "Plan(row_weight) must be positive where there are directions, "
                    "and 0 where there are none."
                )
            if not int(self.counts.max()):
                raise ValueError("Plan(counts) must give some row a direction.")
        if self.sharing < 1:
            raise ValueError(f"Plan(sharing) must be at least 1, got {self.sharing}.")

    @classmethod
    def uniform(cls, rows: int, directions: int, sharing: int = 1) -> Plan:
        """The same number of directions for every row."""
        return cls(torch.full((rows,), directions), sharing)

    @classmethod
    def included(cls, counts: Tensor, probability: Tensor, sharing: int = 1) -> Plan:
        """Rows were drawn at random, and those that were not go without directions.

        A drawn row counts `1 / (rows * probability)`, which makes up for the times when it is not,
        so the mean of the estimate is that of a plan with all rows.

        Args:
            counts: int64 [rows], 0 where the row was not drawn.
            probability: float64 [rows] in (0, 1], with which each row was drawn.
            sharing: as in `Plan`.
        """
        if not bool(((probability > 0) & (probability <= 1)).all()):
            raise ValueError("Plan.included(probability) must lie in (0, 1].")
        weight = torch.where(counts > 0, 1.0 / (len(counts) * probability.double()), 0.0)
        return cls(counts, sharing, weight)

    @classmethod
    def pooled(cls, counts: Tensor, sharing: int = 1) -> Plan:
        """Every pair counts the same, so a row counts by its directions: *another objective*.

        What is estimated is the gradient of a mean in which rows with many directions weigh more.
        Compare it only with methods that weigh the rows alike.
        """
        return cls(counts, sharing, counts.double() / int(counts.sum()))

    @property
    def rows(self) -> int:
        return len(self.counts)

    @property
    def fewest(self) -> int:
        """Directions of the row that has fewest, of those that have any."""
        return int(self.counts[self.counts > 0].min())

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
        """float64 [pairs]: 1 / (rows * count of the pair's row), which sums to 1, unless the rows
        have weights of their own."""
        if self.row_weight is not None:
            return self.row_weight[self.row] / self.counts[self.row].double()
        return 1.0 / (self.rows * self.counts[self.row].double())

    def finite(self, valid: Tensor, least: int = 1) -> tuple[Tensor, int]:
        """Weights that leave out the pairs whose loss was not finite.

        The weights of a row's other pairs grow so that each remaining row counts the same.

        Args:
            valid: bool [pairs].
            least: pairs that a row needs to be of use.

        Returns:
            float64 [pairs] with the sum of `weight`, zero for what is left out, and how many
            invalid there were.

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
        useful, left = left >= least, left[row].clamp(min=1)
        if self.row_weight is None:
            return torch.where(kept, 1.0 / (useful.sum() * left), 0.0), dropped
        weight = self.row_weight.to(row.device)
        weight = weight * (weight.sum() / weight[useful].sum())
        return torch.where(kept, weight[row] / left, 0.0), dropped

    def square_slopes(self, slopes: Tensor, weight: Tensor, least: int = 1) -> Tensor:
        """An estimate of each row's mean squared slope, nan where it has none.

        Args:
            slopes: float64 [pairs], 0 for what is left out.
            weight: from `finite`.
            least: what `finite` was given: 2 for slopes against the mean of the row's others.

        Returns:
            float64 [rows].
        """
        count, total = weight.new_zeros(2, self.rows).unbind()
        count = count.index_add(0, self.row, (weight > 0).double())
        total = total.index_add(0, self.row, slopes.square())
        # A baseline of n - 1 other losses adds the (n - 1)-th part of their variance to a slope's.
        return total / count if least == 1 else total * (count - 1) / count.square()

    def others(self, losses: Tensor, valid: Tensor) -> Tensor:
        """The mean loss of the same row's other valid pairs: a baseline that costs nothing.

        Args:
            losses: float64 [pairs].
            valid: bool [pairs]; a row needs two that are.
        """
        kept = torch.where(valid, losses, 0.0)
        total = kept.new_zeros(self.rows).index_add_(0, self.row, kept)
        count = kept.new_zeros(self.rows).index_add_(0, self.row, valid.double())
        return (total[self.row] - kept) / (count[self.row] - 1).clamp(min=1)

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with its index vectors on `device`."""
        if self.counts.device == torch.device(device):
            return self
        moved = Plan(self.counts, self.sharing, self.row_weight, self.block)
        for name in ("row", "direction", "weight"):
            # Worked out here, so that arithmetic and order are those of the CPU everywhere.
            moved.__dict__[name] = getattr(self, name).to(device)
        moved.__dict__["directions"] = self.directions
        return moved


@dataclass(frozen=True)
class Feedback:
    """What a step has shown, for the plans of later ones.

    Args:
        loss: the estimate's.
        square_norm: of the estimate, over all parameters.
        square_norms: name of a parameter -> of its part.
        variance: the trace of the estimate's covariance, or nan where the estimator gives none.
        rows: name -> float64 [rows], what the estimator tells of each row (see `Estimate`).
    """

    loss: float
    square_norm: float
    square_norms: Mapping[str, float]
    variance: float
    rows: Mapping[str, Tensor] = field(default_factory=dict)


class Allocator(ABC):
    """Divides the queries of a step among its rows.

    Settings are frozen data; what must last from step to step is the state, which goes in and
    comes out as plain numbers and tensors. An allocator spends its budget of directions exactly,
    and knows no estimator. Only what was known before a step may decide its plan: counts that
    depend on the losses which they weigh bias the estimate.

    Attributes:
        directions: mean number of directions a row, in the first step where that changes.
    """

    directions: int

    @property
    def signals(self) -> frozenset[str]:
        """Names of the per-row signals that it reads (see `fwdlearn.signals`).

        A class attribute, or a property where settings decide; `reweights` likewise.
        """
        return frozenset()

    @property
    def reweights(self) -> bool:
        """Whether its plans change the objective, as `Plan.pooled` does."""
        return False

    def init(self) -> State:
        """The state before the first step."""
        return None

    def budget(self, rows: int, state: State) -> int:
        """How many (row, direction) pairs the next plan will have, known before it is made."""
        return rows * self.directions

    @abstractmethod
    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: State, *, key: Key
    ) -> tuple[Plan, State]:
        """The plan of one step.

        Args:
            rows: how many rows the batch has.
            signals: what `self.signals` asked for, each [rows].
            state: from `init` or the last call.
            key: names all randomness.
        """

    def observe(
        self, plan: Plan, signals: Mapping[str, Tensor], feedback: Feedback, state: State
    ) -> State:
        """The state after a step, of whose plan and signals `feedback` tells what came of them."""
        return state

    @classmethod
    @abstractmethod
    def examples(cls) -> list[Self]:
        """Instances for `fwdlearn.testing.check_allocator`."""
