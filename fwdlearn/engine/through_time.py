"""Perturbed passes step by step: memory for one step, however long the sequence.

Losses of sequences that are short enough to take no more memory than that come from passes over the
whole, which are faster.

The fold and the dual are those of any other model. They see one step's uses of the parameters over
and over, and the state takes each query's own perturbation, or its tangents, from step to step:
what comes out is the loss of a sequence under one perturbation that stands still, or its exact
derivative by forward mode through all of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import sequential
from fwdlearn.engine.activity import ActivitySlopes
from fwdlearn.engine.choice import Choice
from fwdlearn.engine.ladder import Engine
from fwdlearn.engine.measured import Measured
from fwdlearn.engine.moments import Moments
from fwdlearn.engine.params import trainable
from fwdlearn.engine.queries import Queries, masks
from fwdlearn.engine.room import Room
from fwdlearn.engine.rules import RULES
from fwdlearn.engine.sites import Activations
from fwdlearn.engine.step_slopes import StepSlopes
from fwdlearn.engine.step_trace import Traced, Unrolled, traced
from fwdlearn.engine.trace import TraceError
from fwdlearn.engine.watch import Start, Watch, by_mode, ways
from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.keys import Key
from fwdlearn.steps import Memory, Sequences, State

# The widest activation of a pass, with its tangents: what keeps products at full speed.
_WIDEST_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
# A sequence of which a pass takes so many rows at once runs whole: one product serves all inputs.
_WHOLE_ROWS = 64
# Largest difference from the reference, relative to the change that the perturbation makes.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}


class TimeEngine:
    """Runs perturbed passes of one model that runs step by step; see `fwdlearn.steps`.

    Args:
        model: an nn.Module that is `Steps`; its weights are never written.
        objective: (output, targets) -> losses [rows], of one step.
        rung: "auto", "fold" or "sequential".
        memory_budget: bytes that the activations of a pass may take, or None for a size that keeps
            the device busy.
        compile: of an `Engine`; steps are not compiled.

    Attributes:
        choice: how perturbed passes run, once that is settled.

    Raises:
        UsageError: a setting is unknown, or nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[Any, Tensor], Tensor],
        rung: str = "auto",
        memory_budget: int | None = None,
        compile: bool | str = False,
    ) -> None:
        if compile or rung not in ("auto", "fold", "sequential"):
            raise UsageError(
                f"{type(model).__name__} runs step by step, on the rungs auto, fold and "
                f"sequential and not compiled; got rung={rung!r}, compile={compile!r}."
            )
        if memory_budget is not None and memory_budget < 1:
            raise UsageError(f"memory_budget must be positive (bytes), got {memory_budget}.")
        self.model: Any = model
        self.objective, self.wanted, self.memory_budget = objective, rung, memory_budget
        self.params: Mapping[str, nn.Parameter] = trainable(model)
        self.choice: Choice | None = None
        self.room = Room()
        self.names = {id(value): name for name, value in self.params.items()}
        self.widest = 1
        self._uses: dict[int, Traced] = {}
        self._watch: Watch = by_mode

    @cached_property
    def moments(self) -> Moments:
        """Noise in the layers, step by step."""
        return Moments(self)

    @cached_property
    def _exact(self) -> StepSlopes:
        """Exact slopes, along tangents that states carry."""
        return StepSlopes(self)

    @cached_property
    def activations(self) -> Activations:
        """Noise anywhere in the sequence, whose memory grows with its length."""
        return self._whole.activations

    @cached_property
    def activity(self) -> ActivitySlopes:
        """Exact slopes along such noise."""
        return self._whole.activity

    @cached_property
    def _whole(self) -> Engine:
        budget = self.memory_budget
        return Engine(self.model, self.objective, memory_budget=budget, room=self.room)

    @torch.no_grad()
    def choose(self, batch: Batch, dropout: Key | None = None) -> Choice:
        """Settles on a rung: the fold, if it equals the reference on rows of `batch`."""
        if sequential.mixes_rows(self.model):
            raise UsageError(
                "batch normalisation in training mode mixes the rows of the batch; leave "
                "train_mode off for a model that runs step by step."
            )
        if self.wanted == "sequential":
            self.choice = Choice("sequential", "asked for; step by step")
            return self.choice
        sequences = Sequences.of(batch, self.objective)
        # An error of the model's own is no reason to step down.
        self._plain(sequences.few(), torch.arange(1, device=batch.device), dropout)
        try:
            found = self._check(sequences.few(), dropout)
        except FwdlearnError:
            raise
        except Exception as error:  # anyone's model, run as it was not written to be
            reason = " ".join(str(error).split())
            if self.wanted == "fold":
                raise UsageError(f"rung 'fold' was asked for, but {reason}.") from error
            self.choice = Choice("sequential", f"fold: {reason}; step by step")
        else:
            self.choice = Choice("fold", f"{found}; step by step")
        return self.choice

    def losses(
        self,
        batch: Batch,
        row: Tensor,
        directions: Directions | None = None,
        direction: Tensor | None = None,
        scale: Tensor | float = 0.0,
        dropout: Key | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Losses [queries]; see `LossOracle.losses`.

        Args:
            memory: of these queries, where their sequences come in pieces.
        """
        sequences = Sequences.of(batch, self.objective)
        dropout = self._dropout(dropout)
        if directions is None or direction is None:
            found, every = self.zero(row), torch.arange(len(row), device=row.device)
            for part in every.split(self.size(1)):
                with masks(dropout, row[part]):
                    found[part] = self._total(sequences, row[part], memory, part)
            return found
        choice = self.choice or self.choose(batch, dropout)
        scale = torch.as_tensor(scale, dtype=torch.float64, device=row.device).expand(len(row))
        if choice.rung == "fold" and memory is None and self._is_short(batch, sequences, dropout):
            return self._whole.losses(batch, row, directions, direction, scale, dropout)
        queries = Queries(batch, row, directions, direction, scale, dropout)
        if choice.rung == "fold":
            return self._fold(sequences, queries, memory)
        return self.reference(sequences, queries, memory)

    def slopes(
        self,
        batch: Batch,
        row: Tensor,
        directions: Directions,
        direction: Tensor,
        dropout: Key | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses [queries] and slopes [queries]; see `SlopeOracle.slopes`.

        Args:
            memory: of these queries, where their sequences come in pieces; tangents too.

        Raises:
            UsageError: an operation of the model has no forward derivative, or hides it.
        """
        sequences = Sequences.of(batch, self.objective)
        return self._exact(sequences, row, directions, direction, self._dropout(dropout), memory)

    def evaluate(self, batch: Batch) -> tuple[Tensor, object]:
        """Losses [rows], and what goes out: at every step that has a target, or at the last."""
        sequences = Sequences.of(batch, self.objective)
        row = torch.arange(len(batch), device=batch.device)
        total = self.zero(row)
        outputs: list[Tensor] = []
        for output, loss, _ in self._run(sequences, row):
            if loss is not None:
                total += loss
            if not sequences.each:
                outputs.clear()
            outputs.append(output)
        return total, torch.stack(outputs, 1) if sequences.each else outputs[-1]

    def measure(
        self,
        batch: Batch,
        residual: bool,
        dropout: Key | None = None,
        memory: Memory | None = None,
    ) -> Measured:
        """A clean pass over the batch, in its order."""
        if residual:
            raise UsageError(
                "the signal 'residual' is of one output a row, and a model that runs step by step "
                "has many; the signal 'loss' serves here."
            )
        row = torch.arange(len(batch), device=batch.device)
        return Measured(self.losses(batch, row, dropout=dropout, memory=memory))

    def size(self, copies: int) -> int:
        """Rows of a pass, each with so many activations of the widest kind."""
        if self.memory_budget is not None:
            # Some eight activations of the widest kind are alive at once.
            return self.room.of(self.memory_budget // (8 * copies * self.widest))
        return self.room.of(_WIDEST_BYTES.get(self.device.type, 2**28) // (copies * self.widest))

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    def _is_short(self, batch: Batch, sequences: Sequences, dropout: Key | None) -> bool:
        """Whether sequences run whole: in the memory that a step may take, and folded too."""
        if self.size(sequences.steps) < _WHOLE_ROWS:
            return False
        whole = self._whole
        return (whole.choice or whole.choose(batch, dropout)).rung == "fold"

    def _dropout(self, dropout: Key | None) -> Key | None:
        return dropout if self.model.training else None

    @property
    def wide(self) -> torch.dtype:
        """Of losses."""
        double = any(value.dtype == torch.float64 for value in self.params.values())
        return torch.float64 if double else torch.float32

    def zero(self, row: Tensor) -> Tensor:
        return torch.zeros(len(row), dtype=self.wide, device=row.device)

    def _run(
        self, sequences: Sequences, row: Tensor, state: State | None = None
    ) -> Iterator[tuple[Any, Tensor | None, State]]:
        """For each step: what goes out, what it adds to the losses if it does, and the state."""
        state = self.model.initial(len(row)) if state is None else state
        for step in range(sequences.steps):
            output, state = self.model.step(sequences.input(step, row), state)
            yield output, sequences.loss(step, row, output), state

    def through(
        self, sequences: Sequences, row: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Losses [len(row)], and the states at the end.

        Args:
            state: to begin with; None for the model's own.
        """
        state = self.model.initial(len(row)) if state is None else state
        total = self.zero(row)
        for step in self._run(sequences, row, state):
            _, loss, state = step
            if loss is not None:
                total = total + loss
        return total, state

    def _total(
        self, sequences: Sequences, row: Tensor, memory: Memory | None = None, place: Any = None
    ) -> Tensor:
        """Losses [len(row)]; queries `place` of the memory go on with their states."""
        total, state = self.through(sequences, row, None if memory is None else memory.at(place))
        if memory is not None:
            memory.keep(place, state)
        return total

    def _plain(self, sequences: Sequences, row: Tensor, dropout: Key | None) -> Tensor:
        with masks(dropout, row):
            return self._total(sequences, row)

    def unrolled(
        self, rules: Any, sequences: Sequences, dropout: Key | None, memory: Memory | None
    ) -> Unrolled:
        head, first, rest = self.traced(rules, sequences, dropout)
        if memory is not None and memory.before is not None:
            head, first = (), rest
        return Unrolled(head, first, rest, sequences.steps)

    def _fold(self, sequences: Sequences, queries: Queries, memory: Memory | None = None) -> Tensor:
        together, order = queries.together()
        place = torch.arange(len(queries), device=queries.row.device) if order is None else order
        uses = self.unrolled(RULES, sequences, queries.dropout, memory)
        found, done = self.zero(queries.row), 0
        with self._watch(self.model, self.params, uses, RULES) as start:
            for some in together.blocks(self.size(1)):
                mine = place[done : done + len(some)]
                done += len(some)
                with some.masks(), start(some) as fold:
                    found[mine] = self._total(sequences, some.row, memory, mine)
                fold.finish()
        return found

    @contextmanager
    def watched(self, sequences: Sequences) -> Iterator[Start]:
        """Within, one step of the model can be folded: what makes the fold of its queries.

        Raises:
            UsageError: the fold was not found to be right for this model.
        """
        if self.choice is None:
            self.choose(Batch((sequences.inputs,), sequences.targets))
        assert self.choice is not None
        if self.choice.rung != "fold":
            raise UsageError(
                f"weights that change at every step need the fold, and {type(self.model).__name__} "
                f"runs on the rung {self.choice.rung}: {self.choice.reason}."
            )
        # A state from outside is no parameter's.
        _, _, rest = self.traced(RULES, sequences, None)
        with self._watch(self.model, self.params, rest, RULES) as start:
            yield start

    def reference(
        self, sequences: Sequences, queries: Queries, memory: Memory | None = None
    ) -> Tensor:
        """One perturbed copy of the parameters at a time."""
        found = self.zero(queries.row)
        for direction, scale, mine in queries.points():
            copy = sequential.perturbed_copy(self.params, queries.directions, direction, scale)
            for part in mine.split(self.size(1)):
                some = queries.at(part)
                with some.masks(), self.seeing(copy):
                    found[part] = self._total(sequences, some.row, memory, part)
        return found

    @contextmanager
    def seeing(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, the model holds other tensors in the place of its parameters."""
        places = [
            (module._parameters, name, value)
            for module in self.model.modules()
            for name, value in module._parameters.items()
            if id(value) in self.names
        ]
        try:
            for holder, name, value in places:
                holder[name] = values[self.names[id(value)]]
            yield
        finally:
            for holder, name, value in places:
                holder[name] = value

    def traced(self, rules: Any, sequences: Sequences, dropout: Key | None) -> Traced:
        """What the initial state, the first step and each of the others use of the parameters.

        Args:
            rules: functions that are known as a whole.
        """
        if id(rules) not in self._uses:
            found, widest = traced(self.model, self.names, rules, sequences, dropout)
            self._uses[id(rules)] = found
            self.widest = max(self.widest, widest)
        return self._uses[id(rules)]

    def _check(self, sequences: Sequences, dropout: Key | None) -> str:
        """What was found when the fold was compared with the reference; raises TraceError."""
        self.traced(RULES, sequences, dropout)
        found = ways(self.params)
        for way in found:
            self._watch = way
            try:
                return self._compared(sequences, dropout)
            except FwdlearnError:
                raise
            except Exception:
                # Of this way to watch; the other decides.
                if way is found[-1]:
                    raise
        raise AssertionError("one of the ways decides")

    def _compared(self, sequences: Sequences, dropout: Key | None) -> str:
        queries, tolerance, least = self.probe(sequences, dropout), self.allowed(_TOLERANCE), 1e9
        plain = self._plain(sequences, queries.row, dropout)
        # Loud enough to be seen over rounding, not so loud that the model saturates.
        for size in (1e-3, 1e-2, 1e-1):
            loud = Queries(
                queries.batch,
                queries.row,
                queries.directions,
                queries.direction,
                queries.scale * size,
                dropout,
            )
            reference = self.reference(sequences, loud)
            change = (reference - plain).abs().max()
            error = (self._fold(sequences, loud) - reference).abs().max()
            if torch.isfinite(change) and change > 0:
                least = min(least, float(error / change))
            if least <= tolerance:
                return f"equals the sequential reference to {least:.1e}"
        raise TraceError(
            f"differs from the reference by {least:.1e} of the change that the perturbation makes "
            f"(allowed: {tolerance:.0e})"
        )

    def probe(self, sequences: Sequences, dropout: Key | None) -> Queries:
        """A query for each of a few rows, along a direction of its own, at scale 1."""
        row = torch.arange(min(3, sequences.rows), device=sequences.inputs.device)
        directions = Directions(Key.root(0).fold("self-check"), self.params, len(row))
        batch = Batch((sequences.inputs,), sequences.targets)
        return Queries(batch, row, directions, row, torch.ones_like(row).double(), dropout)

    def allowed(self, tolerances: Mapping[torch.dtype, float]) -> float:
        return max(tolerances.get(value.dtype, 0.5) for value in self.params.values())
