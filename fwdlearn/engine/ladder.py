"""Which way perturbed passes run, why, and whether that way can be trusted.

The rungs, best first: `fold` (many queries in one forward pass), `copies` (many perturbed copies
in one pass), `sequential` (one perturbed copy at a time). The engine compares a block of queries
on a rung and on the last one, and steps down when they disagree; it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import copies, sequential
from fwdlearn.engine.activity import ActivitySlopes
from fwdlearn.engine.blocks import Blocks
from fwdlearn.engine.choice import Choice
from fwdlearn.engine.measured import Measured
from fwdlearn.engine.offload import is_offloaded
from fwdlearn.engine.outputs import output_sum
from fwdlearn.engine.params import trainable
from fwdlearn.engine.prefix import Still, Visits, once, stills
from fwdlearn.engine.quantized import Quantized
from fwdlearn.engine.queries import Queries, masks
from fwdlearn.engine.room import Room
from fwdlearn.engine.rules import RULES
from fwdlearn.engine.sites import Activations
from fwdlearn.engine.slopes import Slopes
from fwdlearn.engine.trace import Lookups, Recorder, TraceError, Use, compare
from fwdlearn.engine.watch import Start, Watch, by_mode, ways
from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.keys import Key
from fwdlearn.memory import freed_pages_return
from fwdlearn.objectives import per_row

if TYPE_CHECKING:
    from fwdlearn.engine.compiled import Compiled

RUNGS = ("fold", "copies", "sequential")

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
        virtual: patterns of weights of quantised layers, `<layer>.weight`, that are perturbed too.
            They are among `params` as zeros of the right shape: their estimates are those of the
            dequantised matrix, and no update can be written into integers.
        room: shared with another engine, where the two take memory together.

    Raises:
        UsageError: `rung` or `compile` is unknown, a pattern matches nothing, or there is nothing
            to perturb.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        rung: str = "auto",
        memory_budget: int | None = None,
        compile: bool | str = False,
        virtual: Sequence[str] = (),
        room: Room | None = None,
    ) -> None:
        if compile not in _BACKENDS:
            names = ", ".join(repr(name) for name in _BACKENDS)
            raise UsageError(f"compile must be one of {names}, got {compile!r}.")
        if rung not in ("auto", *RUNGS):
            known = f"auto, {', '.join(RUNGS[:-1])} or {RUNGS[-1]}"
            raise UsageError(f"rung must be {known}, got {rung!r}.")
        if memory_budget is not None and memory_budget < 1:
            raise UsageError(f"memory_budget must be positive (bytes), got {memory_budget}.")
        self.model, self.objective = model, objective
        trained = trainable(model, required=not virtual)
        self.quantized = Quantized(model, trained, virtual)
        self.params: Mapping[str, nn.Parameter] = dict(
            sorted({**trained, **self.quantized.weights}.items())
        )
        self.wanted, self.memory_budget = rung, memory_budget
        self.room = room or Room()
        self.blocks = Blocks(memory_budget, self.room)
        self.choice: Choice | None = None
        self.events: list[Choice] = []
        self._names = {id(value): name for name, value in self.params.items()}
        self._uses: tuple[Use, ...] = ()
        self._tables: frozenset[str] = frozenset()
        self._widest = 1
        self._still: tuple[Still, ...] = ()
        self._watch: Watch = by_mode
        self._parts_exact: dict[tuple[str, ...], Slopes] = {}
        self.compiled: Compiled | None = None
        if compile and any(is_offloaded(value) for value in self.params.values()):
            raise UsageError(
                "compile=True makes graphs that hold the weights, and with trainer.offload these "
                "come and go; leave one of the two out."
            )
        if compile:
            # Slow to import, and seldom asked for.
            from fwdlearn.engine.compiled import Compiled

            backend = compile if isinstance(compile, str) else "inductor"
            with self.quantized.shown():
                self.compiled = Compiled(model, self.params, self.row_losses, backend)

    @cached_property
    def activations(self) -> Activations:
        """Noise in the outputs of layers, and gradients by local products."""
        return Activations(self)

    @cached_property
    def activity(self) -> ActivitySlopes:
        """Exact slopes along such noise."""
        return ActivitySlopes(self)

    @cached_property
    def exact(self) -> Slopes:
        """Exact slopes, with a choice of rungs and events of their own."""
        return self._slopes_at(self.params)

    @contextmanager
    def shown(self, batch: Batch, dropout: Key | None) -> Iterator[None]:
        """Within, quantised layers are as the passes need them; see `Quantized`."""

        def run() -> Tensor:
            row = torch.arange(min(2, len(batch)), device=batch.device)
            rows, state = batch.select(row), {}
            if sequential.mixes_rows(self.model):
                # What a pass writes on the running statistics must leave no trace.
                state = {name: value.clone() for name, value in self.model.named_buffers()}
            with masks(dropout, row):
                output = functional_call(self.model, state, rows.args, dict(rows.kwargs))
            return self.row_losses(output, rows)

        self.quantized.check(run)
        with self.quantized.shown():
            yield

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
        with self.shown(batch, dropout):
            return self._slopes_of(directions.params)(batch, row, directions, direction, dropout)

    def _slopes_of(self, names: Collection[str]) -> Slopes:
        """For directions that lack parameters, one that takes the rest for constants."""
        if len(names) == len(self.params):
            return self.exact
        own = {name: self.params[name] for name in self.params if name in names}
        if tuple(own) not in self._parts_exact:
            self._parts_exact[tuple(own)] = self._slopes_at(own)
        return self._parts_exact[tuple(own)]

    def _slopes_at(self, params: Mapping[str, Tensor]) -> Slopes:
        budget = self.memory_budget
        return Slopes(self.model, params, self.row_losses, memory_budget=budget, room=self.room)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the trainable parameters."""
        dtypes = {value.dtype for value in self.params.values()}
        return max(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))

    def block(self, batch: Batch) -> int:
        """Rows of one plain pass; see `Blocks`."""
        dropout = Key.root(0) if self.model.training else None
        with self.shown(batch, dropout):
            return self.blocks.plain(
                batch, lambda row: self._clean(batch, row, dropout), self._widest
            )

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
        with self.shown(batch, dropout):
            if directions is None or direction is None:
                return self._plain(batch, row, dropout)
            scale = torch.as_tensor(scale, dtype=torch.float64, device=row.device)
            scale = scale.expand(len(row))
            return self._perturbed(Queries(batch, row, directions, direction, scale, dropout))

    def _perturbed(self, queries: Queries) -> Tensor:
        batch, dropout = queries.batch, queries.dropout
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
                    self._step_down(batch, dropout, ("copies",), {"fold": str(error)})
        if self.choice.rung == "copies":
            try:
                return self._copies(queries)
            except TraceError as error:
                # First, because an error of the model's own is no reason to step down.
                losses = self._sequential(queries)
                self._step_down(batch, dropout, (), {"copies": str(error)})
                return losses
        return self._sequential(queries)

    def choose(self, batch: Batch, dropout: Key | None = None) -> Choice:
        """Settles on a rung: the first that equals the reference on rows of `batch`."""
        dropout = dropout if self.model.training else None
        with self.shown(batch, dropout), freed_pages_return():
            if self.wanted == "sequential":
                self._settle(Choice("sequential", "asked for"))
            elif sequential.mixes_rows(self.model):
                mixing = "batch normalisation in training mode mixes the rows of the batch"
                self._step_down(batch, dropout, (), {"fold": mixing})
            else:
                # An error of the model's own is no reason to step down.
                self._clean(batch, torch.arange(1, device=batch.device), dropout)
                self._step_down(batch, dropout, RUNGS[:-1])
        assert self.choice is not None
        return self.choice

    def row_losses(self, output: object, rows: Batch) -> Tensor:
        """The objective on the output of one forward pass, one loss a row."""
        return per_row(self.objective(output, rows.targets), len(rows))

    def evaluate(self, batch: Batch) -> tuple[Tensor, object]:
        """Losses [rows] of a plain pass, and what the model returned."""
        output = self.model(*batch.args, **batch.kwargs)
        return self.row_losses(output, batch), output

    def read(self, batch: Batch, dropout: Key | None = None) -> Mapping[str, Tensor]:
        """Name of a table -> the entries that rows of the batch look up, int64 [k], ascending.

        A table is a parameter with no other use before or after: what is not looked up has no
        gradient. Takes a pass over the batch that ends where its tables have been read, like one
        that memory does not suffice for.
        """
        if self.choice is None:
            self.choose(batch, dropout)
        if not self._tables:
            return {}
        seen = Lookups({id(self.params[name]): name for name in self._tables})
        row = torch.arange(len(batch), device=batch.device)
        with masks(dropout if self.model.training else None, row), suppress(Lookups.Known), seen:
            self.model(*batch.args, **batch.kwargs)
        return {name: torch.cat(parts).unique() for name, parts in seen.found.items() if parts}

    def measure(self, batch: Batch, residual: bool, dropout: Key | None = None) -> Measured:
        """A clean pass over the batch, in its order."""
        dropout = dropout if self.model.training else None
        if self.choice is None:
            self.choose(batch, dropout)
        row = torch.arange(len(batch), device=batch.device)
        with self.shown(batch, dropout):
            if not residual:
                return Measured(self._plain(batch, row, dropout))
            losses, pairs = [], []
            for part in self._parts(batch, row):
                output, rows = self._output(batch, part, dropout)
                losses.append(self.row_losses(output, rows))
                pairs.append((output, rows.targets))
            return Measured.of(torch.cat(losses), pairs)

    def _plain(self, batch: Batch, row: Tensor, dropout: Key | None) -> Tensor:
        parts = self._parts(batch, row)
        return torch.cat([self._clean(batch, part, dropout) for part in parts])

    def _parts(self, batch: Batch, row: Tensor) -> Sequence[Tensor]:
        mixing = sequential.mixes_rows(self.model)
        return (row,) if mixing else row.split(self.block(batch))

    def _clean(self, batch: Batch, row: Tensor, dropout: Key | None) -> Tensor:
        return self.row_losses(*self._output(batch, row, dropout))

    def _output(self, batch: Batch, row: Tensor, dropout: Key | None) -> tuple[object, Batch]:
        rows = batch.select(row)
        with masks(dropout, row):
            return self.model(*rows.args, **rows.kwargs), rows

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

    def _copies(self, queries: Queries, block: int | None = None) -> Tensor:
        size, budget = block or self.block(queries.batch), self.memory_budget
        return copies.run(self.model, self.params, queries, self.row_losses, size, budget)

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
        self._tables = recorders[0].tables & recorders[1].tables
        self._still = stills(*visits)
        self._widest = -(-recorders[1].widest // 3)

    def _measure(self, batch: Batch, dropout: Key | None) -> None:
        """The widest activation, of a model that could not be traced."""
        row = torch.zeros(1, dtype=torch.int64, device=batch.device)
        recorder = Recorder({}, RULES)
        with recorder:
            self._clean(batch, row, dropout)
        self._widest = max(self._widest, recorder.widest)

    def _check_fold(self, batch: Batch, dropout: Key | None) -> str:
        """Checks the fold, in the cheap way of watching parameters if that sees them all."""
        self._trace(batch, dropout)
        *cheaper, last = ways(self.params)
        for way in cheaper:
            try:
                self._watch = way
                return self._check(batch, dropout, self._fold)
            except FwdlearnError:
                raise
            except Exception:  # of this way to watch; the other decides
                pass
        self._watch = last
        return self._check(batch, dropout, self._fold)

    def _check_copies(self, batch: Batch, dropout: Key | None) -> str:
        self._measure(batch, dropout)
        found = self._check(batch, dropout, self._copies)
        row = torch.arange(min(2, len(batch)), device=batch.device)
        directions = Directions(Key.root(0).fold("self-check"), self.params, len(row))
        nowhere = torch.zeros(len(row), dtype=torch.float64, device=batch.device)
        queries = Queries(batch, row, directions, row, nowhere, dropout)
        loop = copies.looped(self.model, self.params, queries, self.row_losses)
        return f"{found}; {loop} runs one copy at a time" if loop else found

    def _check(
        self, batch: Batch, dropout: Key | None, run: Callable[[Queries, int], Tensor]
    ) -> str:
        """What was found when `run` was compared with the reference; raises TraceError."""
        count = min(3, len(batch))
        row = torch.arange(count, device=batch.device)
        alone = torch.cat([self._clean(batch, one, dropout) for one in row.split(1)])
        rounding = (self._clean(batch, row, dropout) - alone).abs().max()
        directions = Directions(Key.root(0).fold("self-check"), self.params, count)
        tolerance = _TOLERANCE.get(self.dtype, 0.1)
        least, moved = float("inf"), False
        # Loud enough to be seen over rounding, not so loud that the model saturates.
        for size in (1e-3, 1e-2, 1e-1):
            scale = torch.full((count,), size, dtype=torch.float64, device=batch.device)
            queries = Queries(batch, row, directions, row, scale, dropout)
            reference = self._sequential(queries, 1)
            change = (reference - alone).abs().max()
            moved = moved or bool(change != 0)
            # More than this is no rounding: then a row sees the others, or chance.
            slack = torch.minimum(rounding, tolerance * change)
            error = (run(queries, count) - reference).abs().max() - slack
            if torch.isfinite(change) and change > 0:
                least = min(least, max(float(error / change), 0.0))
            if least <= tolerance:
                return f"equals the sequential reference to {least:.1e}"
        if not moved and self.objective is not output_sum:
            # The loss has plateaus; what the model puts out may have none.
            own, self.objective = self.objective, output_sum
            try:
                return self._check(batch, dropout, run)
            finally:
                self.objective = own
        if rounding > tolerance * change:
            raise TraceError("the loss of a row depends on the rows beside it, or on chance")
        raise TraceError(
            f"differs from the reference by {least:.1e} of the change that the perturbation makes "
            f"(allowed: {tolerance:.0e})"
        )

    def _settle(self, choice: Choice) -> None:
        self.choice = choice
        self.events.append(choice)

    def _step_down(
        self,
        batch: Batch,
        dropout: Key | None,
        rungs: Sequence[str],
        failed: Mapping[str, str] | None = None,
    ) -> None:
        """Settles on the first of `rungs` that equals the reference, or on the reference."""
        failed = dict(failed or {})
        for rung in rungs:
            if self.wanted not in ("auto", rung):
                continue
            check = {"fold": self._check_fold, "copies": self._check_copies}[rung]
            try:
                found = check(batch, dropout)
            except FwdlearnError:
                raise
            except Exception as error:  # anyone's model, run as it was not written to be
                failed[rung] = " ".join(str(error).split())
            else:
                return self._settle(Choice(rung, _reasons(failed, found)))
        if self.wanted != "auto":
            raise UsageError(
                f"rung {self.wanted!r} was asked for, but {list(failed.values())[-1]}; leave rung "
                "at 'auto' to step down."
            )
        self._settle(Choice("sequential", _reasons(failed)))


def _reasons(failed: Mapping[str, str], *found: str) -> str:
    return "; ".join([*(f"{rung}: {why}" for rung, why in failed.items()), *found])
