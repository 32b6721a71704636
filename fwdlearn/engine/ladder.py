"""Which way perturbed passes run, why, and whether that way can be trusted.

The rungs, best first: `fold` (many queries in one forward pass), `sequential` (one perturbed copy
at a time). The engine traces the model, compares a block of queries on both, and steps down when
they disagree; it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import sequential
from fwdlearn.engine.blocks import Blocks
from fwdlearn.engine.choice import Choice
from fwdlearn.engine.params import trainable
from fwdlearn.engine.prefix import Still, Visits, once, stills
from fwdlearn.engine.queries import Queries, masks
from fwdlearn.engine.rules import RULES
from fwdlearn.engine.sites import Activations
from fwdlearn.engine.slopes import Slopes
from fwdlearn.engine.trace import Recorder, TraceError, Use, compare
from fwdlearn.engine.watch import Start, Watch, by_mode, by_type
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

if TYPE_CHECKING:
    from fwdlearn.engine.compiled import Compiled

RUNGS = ("fold", "sequential")

# Largest difference between rungs, relative to the change that the perturbation makes.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}

_BACKENDS = (False, True, "inductor", "aot_eager", "eager")

Objective = Callable[[object, Tensor], Tensor]


class Engine:
    """Runs perturbed forward passes of one model.

    Args:
        model: any module; its weights are never written.
        objective: (output, targets) -> losses [rows].
        rung: "auto", or one of `RUNGS` to insist on it.
        memory_budget: bytes that a pass may take at its peak, or None for a size that keeps the
            device busy.
        compile: whether folded passes run as compiled graphs: True for `torch.compile`'s own
            compiler, or the name of one of its backends. Losses differ by rounding.

    Raises:
        UsageError: `rung` or `compile` is unknown, or nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        rung: str = "auto",
        memory_budget: int | None = None,
        compile: bool | str = False,
    ) -> None:
        if compile not in _BACKENDS:
            names = ", ".join(repr(name) for name in _BACKENDS)
            raise UsageError(f"compile must be one of {names}, got {compile!r}.")
        if rung not in ("auto", *RUNGS):
            raise UsageError(f"rung must be auto, {' or '.join(RUNGS)}, got {rung!r}.")
        if memory_budget is not None and memory_budget < 1:
            raise UsageError(f"memory_budget must be positive (bytes), got {memory_budget}.")
        self.model, self.objective = model, objective
        self.params: Mapping[str, nn.Parameter] = trainable(model)
        self.wanted, self.memory_budget = rung, memory_budget
        self.blocks = Blocks(memory_budget)
        self.choice: Choice | None = None
        self.events: list[Choice] = []
        self._names = {id(value): name for name, value in self.params.items()}
        self._uses: tuple[Use, ...] = ()
        self._widest = 1
        self._still: tuple[Still, ...] = ()
        self._watch: Watch = by_mode
        self.compiled: Compiled | None = None
        if compile:
            # Slow to import, and seldom asked for.
            from fwdlearn.engine.compiled import Compiled

            backend = compile if isinstance(compile, str) else "inductor"
            self.compiled = Compiled(model, self.params, self.row_losses, backend)

    @cached_property
    def activations(self) -> Activations:
        """Noise in the outputs of layers, and gradients by local products."""
        return Activations(self)

    @cached_property
    def exact(self) -> Slopes:
        """Exact slopes, with a choice of rungs and events of their own."""
        return Slopes(self.model, self.params, self.row_losses, memory_budget=self.memory_budget)

    def slopes(
        self,
        batch: Batch,
        row: Tensor,
        directions: Directions,
        direction: Tensor,
        dropout: Key | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses [queries] and slopes [queries]; see `SlopeOracle.slopes`."""
        dropout = dropout if self.model.training else None
        return self.exact(batch, row, directions, direction, dropout)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the trainable parameters."""
        dtypes = {value.dtype for value in self.params.values()}
        return max(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))

    def block(self, batch: Batch) -> int:
        """Rows of one plain pass; see `Blocks`."""
        dropout = Key.root(0) if self.model.training else None
        return self.blocks.plain(batch, lambda row: self._clean(batch, row, dropout), self._widest)

    def losses(
        self,
        batch: Batch,
        row: Tensor,
        directions: Directions | None = None,
        direction: Tensor | None = None,
        scale: Tensor | float = 0.0,
        dropout: Key | None = None,
    ) -> Tensor:
        """Losses [queries]; see `LossOracle.losses`. `dropout` names the masks of the batch."""
        dropout = dropout if self.model.training else None
        if self.choice is None:
            self.choose(batch, dropout)
        if directions is None or direction is None:
            return self._plain(batch, row, dropout)
        scale = torch.as_tensor(scale, dtype=torch.float64, device=row.device).expand(len(row))
        queries = Queries(batch, row, directions, direction, scale, dropout)
        assert self.choice is not None
        if self.choice.rung == "fold":
            try:
                return self._fold(queries)
            except TraceError:
                # Another kind of batch may take another path through the model.
                try:
                    self._trace(batch, dropout)
                    return self._fold(queries)
                except TraceError as error:
                    self._step_down(str(error))
        return self._sequential(queries)

    def choose(self, batch: Batch, dropout: Key | None = None) -> Choice:
        """Traces the model on rows of `batch`, checks the fold, and settles on a rung."""
        dropout = dropout if self.model.training else None
        if self.wanted == "sequential":
            self._settle(Choice("sequential", "asked for"))
        elif sequential.mixes_rows(self.model):
            self._step_down("batch normalisation in training mode mixes the rows of the batch")
        else:
            try:
                self._trace(batch, dropout)
                error = self._watched(batch, dropout)
                self._settle(Choice("fold", f"equals the sequential reference to {error:.1e}"))
            except TraceError as error:
                self._step_down(str(error))
        assert self.choice is not None
        return self.choice

    def row_losses(self, output: object, rows: Batch) -> Tensor:
        """The objective on the output of one forward pass, one loss a row."""
        losses = self.objective(output, rows.targets)
        if not isinstance(losses, Tensor) or losses.shape != (len(rows),):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UsageError(
                f"the objective must return one loss a row, [{len(rows)}], got {shape}; "
                "a mean over rows cannot be told apart again."
            )
        return losses.to(torch.promote_types(losses.dtype, torch.float32))

    def _plain(self, batch: Batch, row: Tensor, dropout: Key | None) -> Tensor:
        mixing = sequential.mixes_rows(self.model)
        parts = (row,) if mixing else row.split(self.block(batch))
        return torch.cat([self._clean(batch, part, dropout) for part in parts])

    def _clean(self, batch: Batch, row: Tensor, dropout: Key | None) -> Tensor:
        rows = batch.select(row)
        with masks(dropout, row):
            output = self.model(*rows.args, **rows.kwargs)
        return self.row_losses(output, rows)

    def _fold(self, queries: Queries, block: int | None = None) -> Tensor:
        together, order = queries.together()
        size = block or self.blocks.perturbed(
            together, lambda some: self._fold(some, len(some)), self._widest
        )
        with self._watch(self.model, self.params, self._uses, RULES) as start:
            # A size of its own is for checks and measurements, of the plain fold.
            run = self._eager if block else self._folded
            losses = torch.cat([run(start, some) for some in together.blocks(size)])
        return losses if order is None else torch.empty_like(losses).index_copy_(0, order, losses)

    def _folded(self, start: Start, some: Queries) -> Tensor:
        compiled = self.compiled
        if compiled is None or compiled.refusal is not None or self.choice is None:
            return self._eager(start, some)
        losses = compiled.losses(some, self._uses, RULES, lambda: self._eager(start, some))
        if compiled.refusal is not None:
            self._settle(replace(self.choice, reason=f"not compiled: {compiled.refusal}"))
        return losses

    def _eager(self, start: Start, some: Queries) -> Tensor:
        # Of its own, so that the tensors of a block are gone when the next one begins.
        rows = some.inputs()
        with once(self._still, some), some.masks(), start(some) as fold:
            output = self.model(*rows.args, **rows.kwargs)
        fold.finish()
        return self.row_losses(output, rows)

    def _sequential(self, queries: Queries, block: int | None = None) -> Tensor:
        mixing = sequential.mixes_rows(self.model)
        size = block or (len(queries) if mixing else self.block(queries.batch))
        return sequential.run(self.model, self.params, queries, self.row_losses, size)

    def _trace(self, batch: Batch, dropout: Key | None) -> None:
        recorders, visits = [], []
        for count in (2, 3):
            index = torch.arange(count, device=batch.device) % len(batch)
            # New tensors, because the trace marks them.
            rows = batch.select(index).map(torch.clone)
            recorder = Recorder(self._names, RULES)
            recorder.start((rows.args, dict(rows.kwargs)))
            seen = Visits(self.model, self._names, recorder)
            with masks(dropout, index), recorder, seen:
                self.model(*rows.args, **rows.kwargs)
            recorders.append(recorder)
            visits.append(seen)
        self._uses = compare(*recorders)
        self._still = stills(*visits)
        self._widest = -(-recorders[1].widest // 3)

    def _watched(self, batch: Batch, dropout: Key | None) -> float:
        """Checks the fold, in the cheap way of watching parameters if that sees them all."""
        if all(type(value) in (Tensor, nn.Parameter) for value in self.params.values()):
            try:
                self._watch = by_type
                return self._check(batch, dropout)
            except TraceError:
                pass
        self._watch = by_mode
        return self._check(batch, dropout)

    def _check(self, batch: Batch, dropout: Key | None) -> float:
        """The largest difference between the fold and the reference, relative to the change."""
        count = min(3, len(batch))
        row = torch.arange(count, device=batch.device)
        alone = torch.cat([self._clean(batch, one, dropout) for one in row.split(1)])
        rounding = (self._clean(batch, row, dropout) - alone).abs().max()
        directions = Directions(Key.root(0).fold("self-check"), self.params, count)
        tolerance = _TOLERANCE.get(self.dtype, 0.1)
        least = float("inf")
        # Loud enough to be seen over rounding, not so loud that the model saturates.
        for size in (1e-3, 1e-2, 1e-1):
            scale = torch.full((count,), size, dtype=torch.float64, device=batch.device)
            queries = Queries(batch, row, directions, row, scale, dropout)
            reference = self._sequential(queries, 1)
            error = (self._fold(queries, count) - reference).abs().max() - rounding
            change = (reference - alone).abs().max()
            if torch.isfinite(change) and change > 0:
                least = min(least, max(float(error / change), 0.0))
            if least <= tolerance:
                return least
        raise TraceError(
            f"the folded pass differs from the reference by {least:.1e} of the change that the "
            f"perturbation makes (allowed: {tolerance:.0e})"
        )

    def _settle(self, choice: Choice) -> None:
        self.choice = choice
        self.events.append(choice)

    def _step_down(self, reason: str) -> None:
        if self.wanted == "fold":
            raise UsageError(
                f"rung 'fold' was asked for, but {reason}; leave rung at 'auto' to step down."
            )
        self._settle(Choice("sequential", reason))
