"""Models that run step by step, and batches of sequences.

A model counts by its methods alone: `initial(rows)` gives the state before the first step, and
`step(x, state)` what goes out and the next state. `forward` of such a model maps
[rows, steps, ...] to what its steps put out. Passes step by step need memory for one step, however
many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.errors import UsageError
from fwdlearn.objectives import at_step, counted, per_step

# Steps that are looked at together.
_PART = 256
# Steps of those that are made for checks.
_FEW = 4

State = dict[str, Tensor]
"""What a model carries from step to step: name -> [rows, ...]."""


@runtime_checkable
class Steps(Protocol):
    """A model that runs step by step, on plain torch operations."""

    def initial(self, rows: int) -> State:
        """The state before the first step."""

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: x [rows, ...] and a state to an output [rows, ...] and the next state."""


class Memory:
    """The states of some queries at the end of a piece of their sequences.

    Args:
        before: name -> [queries, ...], at the end of the piece before; None if there is none.
        queries: how many there are.

    Attributes:
        after: the same at the end of this piece.
    """

    def __init__(self, before: State | None, queries: int) -> None:
        self.before, self.queries = before, queries
        self.after: State = {}

    def at(self, place: Tensor) -> State | None:
        """The states of queries `place`, int64 [n], with which they go on; None at a beginning."""
        if self.before is None:
            return None
        return {name: value[place] for name, value in self.before.items()}

    def keep(self, place: Tensor, state: State) -> None:
        """Takes the states of queries `place`, with which the next piece will go on."""
        for name, value in state.items():
            if name not in self.after:
                self.after[name] = value.new_zeros(self.queries, *value.shape[1:])
            self.after[name][place] = value


@dataclass
class Carried:
    """What goes from one piece of some sequences to the next.

    Args:
        questions: the states of the queries of each question of a step, in their order.
        steps: of the sequences so far.
    """

    questions: list[State] = field(default_factory=list)
    steps: int = 0


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences, step by step.

    Targets [rows, steps, ...] of numbers or [rows, steps] of classes make a loss at every step that
    counts; others belong to the last step.

    Args:
        inputs: [rows, steps, ...].
        targets: see above.
        objective: (output, targets) -> losses [rows], of one step.
    """

    inputs: Tensor
    targets: Tensor
    objective: Callable[[Any, Tensor], Tensor]

    @classmethod
    def of(cls, batch: Batch, objective: Callable[[Any, Tensor], Tensor]) -> Sequences:
        """Raises UsageError unless the batch has one input, [rows, steps, ...]."""
        values = (*batch.args, *batch.kwargs.values())
        if len(values) != 1 or values[0].dim() < 2 or not values[0].shape[1]:
            shapes = ", ".join(str(tuple(value.shape)) for value in values)
            raise UsageError(
                "a model that runs step by step takes one input [rows, steps, ...], got "
                f"{shapes or 'none'}."
            )
        made = cls(values[0], batch.targets, objective)
        if made.each and batch.targets.shape[1] != made.steps:
            raise UsageError(
                f"targets {tuple(batch.targets.shape)} do not fit inputs "
                f"{tuple(values[0].shape)}: both must have as many steps."
            )
        return made

    @property
    def rows(self) -> int:
        return len(self.targets)

    @property
    def steps(self) -> int:
        return self.inputs.shape[1]

    @cached_property
    def each(self) -> bool:
        """Whether each step has a target."""
        return per_step(self.targets)

    def few(self) -> Sequences:
        """A few rows and steps for checks; a loss that comes last comes at the last of them."""
        steps, rows = min(_FEW, self.steps), slice(0, 3)
        first = next((n for n in range(self.steps) if self.counts(n)), 0)
        begin = max(0, min(first, self.steps - steps))
        place = slice(begin, begin + steps)
        targets = self.targets[rows, place] if self.each else self.targets[rows]
        return Sequences(self.inputs[rows, place], targets, self.objective)

    def input(self, step: int, row: Tensor) -> Tensor:
        """[len(row), ...]: what comes in."""
        return self.inputs[:, step].index_select(0, row)

    def loss(self, step: int, row: Tensor, output: Tensor) -> Tensor | None:
        """What a step adds to the losses of rows, [len(row)]; None where it counts for no row."""
        losses = self.losses(step, row)
        return None if losses is None else losses(output)

    def losses(self, step: int, row: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The same as a function of the output, for those who ask again and again."""
        if not self.counts(step):
            return None
        targets = self.target(step).index_select(0, row)
        weights = self.weight(step).index_select(0, row)
        return partial(at_step, self.objective, targets=targets, weights=weights)

    def target(self, step: int) -> Tensor:
        """[rows, ...]: of a step that counts."""
        return self.targets[:, step] if self.each else self.targets

    def weight(self, step: int) -> Tensor:
        """float64 [rows]: what a step that counts counts, see `objectives.step_weights`."""
        if not self.each:
            return torch.ones(self.rows, dtype=torch.float64, device=self.targets.device)
        return counted(self.targets[:, step : step + 1])[:, 0] / self._counts[0]

    def counts(self, step: int) -> bool:
        """Whether a step counts for some row."""
        return self._counts[1][step] if self.each else step == self.steps - 1

    @cached_property
    def _counts(self) -> tuple[Tensor, Sequence[bool]]:
        """Of each row how many steps count, float64 and at least 1; whether each step does."""
        total, some = torch.zeros(self.rows, device=self.targets.device), list[bool]()
        # In parts: what there is to know of a long sequence takes no room.
        for part in self.targets.split(_PART, 1):
            counts = counted(part)
            total += counts.sum(1)
            some += counts.any(0).tolist()
        return total.clamp(min=1).double(), some
