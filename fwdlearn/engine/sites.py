"""Layer outputs as places where noise enters, and gradients by local products.

Queries are rows of one forward pass, as in the fold. The products run with clean inputs, so that
noise in one layer does not disturb the gradient of the next; no graph spans two layers, because
there is none.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.engine import sequential
from fwdlearn.engine.blocks import Blocks
from fwdlearn.engine.head import by_output
from fwdlearn.engine.local import PRODUCTS
from fwdlearn.engine.measured import Measured
from fwdlearn.engine.passes import Gradients, Pass
from fwdlearn.engine.queries import masks
from fwdlearn.engine.shifts import Shift, Shifting
from fwdlearn.engine.trace import Recorder, Rows, TraceError, Use, compare
from fwdlearn.engine.visits import Gathering, Local, Noisy, Survey
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import Noise, Output
from fwdlearn.objectives import by_formula

if TYPE_CHECKING:
    from fwdlearn.engine.ladder import Engine

T = TypeVar("T")
# An output with more numbers a row gets no exact cotangent where each takes a forward derivative.
_WIDEST_OUTPUT = 4096


@dataclass(frozen=True)
class Part:
    """Some rows of a clean pass, and what is kept of them."""

    start: int
    rows: Batch
    output: Any
    losses: Tensor
    kept: list[Local]
    squares: dict[str, tuple[Tensor, Tensor]]
    last: tuple[str, Tensor, Any] | None
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class Clean:
    """A clean pass over the batch, with the inputs of its layers; see `fwdlearn.oracle.Clean`."""

    engine: Engine
    parts: list[Part] = field(repr=False)

    @cached_property
    def losses(self) -> Tensor:
        return torch.cat([part.losses for part in self.parts])

    def measured(self, residual: bool) -> Measured:
        """What the pass tells of each row."""
        if not residual:
            return Measured(self.losses)
        return Measured.of(self.losses, [(part.output, part.rows.targets) for part in self.parts])

    @cached_property
    def rms(self) -> Mapping[str, Tensor]:
        found = {}
        for site in self.parts[0].squares:
            sums, counts = zip(*(part.squares[site] for part in self.parts), strict=True)
            found[site] = (torch.stack(sums).sum() / torch.stack(counts).sum()).sqrt()
        return found

    @cached_property
    def outputs(self) -> Mapping[str, Tensor]:
        names = self.parts[0].outputs
        return {name: torch.cat([part.outputs[name] for part in self.parts]) for name in names}

    def gather(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        _check(cotangents, self.rms)
        gradients: Gradients = {}
        with torch.no_grad():
            for part in self.parts:
                for local in part.kept:
                    _multiply(cotangents, gradients, part.start, local)
        return gradients

    @cached_property
    def exact(self) -> Mapping[str, Tensor]:
        with torch.no_grad():
            found = [head for part in self.parts if (head := self._head(part)) is not None]
        if len(found) < len(self.parts):
            return {}
        cotangent = torch.cat([c for _, c in found])
        return {found[0][0]: cotangent} if cotangent.any() else {}

    def _head(self, part: Part) -> tuple[str, Tensor] | None:
        """The site whose output is the model's, and the derivative of the losses by it."""
        output = part.output
        value = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if part.last is None or value is not part.last[1]:
            return None
        site, _, where = part.last
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if where == Rows(0):
            # A vocabulary at every token: one derivative after the other would take all day.
            found = by_formula(self.engine.objective, value, part.rows.targets)
            if found is not None:
                return site, found.to(value.dtype)
        if value.numel() > _WIDEST_OUTPUT * len(part.rows):
            return None

        def losses(value: Tensor) -> Tensor:
            seen = value
            if not isinstance(output, Tensor):
                seen = copy.copy(output)
                seen.logits = value
            return self.engine.row_losses(seen, part.rows)

        return site, by_output(losses, value, len(part.rows), where).to(value.dtype)


class Activations:
    """Noise in the layer outputs of one model, and gradients from their cotangents.

    Args:
        engine: knows the model, its parameters and its objective.

    Attributes:
        left_out: name of a parameter -> why a part of its gradient cannot be had.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.left_out: Mapping[str, str] = {}
        self._uses: tuple[Use, ...] | None = None
        self._sites: list[str | None] = []
        self._outputs: dict[Any, Mapping[str, Output]] = {}
        self._block_sizes, self._widest = Blocks(engine.memory_budget, engine.room), 1

    def outputs(self, batch: Batch, dropout: Key | None) -> Mapping[str, Output]:
        """Name of a site -> what a row of this batch puts out there.

        Rows of a shape not met before take a pass of one row, as the trace does, not a query.
        """

        def look() -> Mapping[str, Output]:
            kind = _kind(batch)
            if kind not in self._outputs:
                self._survey(batch, dropout, 1)
            return self._outputs[kind]

        return self._traced(batch, dropout, look)

    def noisy_losses(
        self,
        batch: Batch,
        row: Tensor,
        noise: Noise,
        index: Tensor,
        scale: Tensor,
        dropout: Key | None,
    ) -> Tensor:
        """Losses [queries]; `scale` is float64 [queries]."""

        def run() -> Tensor:
            _check(noise.names, self.outputs(batch, dropout))
            losses, block = [], self._block(batch, dropout)
            for start in range(0, len(row), block):
                some = slice(start, start + block)
                mode = Noisy(
                    *self._model(len(row[some])),
                    sites=self._sites,
                    noise=noise,
                    index=index[some],
                    scale=scale[some],
                )
                rows, output = self._run(mode, batch, row[some], dropout)
                losses.append(self.engine.row_losses(output, rows))
            return torch.cat(losses)

        return self._traced(batch, dropout, run)

    def shifts(
        self,
        batch: Batch,
        clean: Mapping[str, Tensor],
        row: Tensor,
        noise: Noise,
        index: Tensor,
        scale: Tensor,
        dropout: Key | None,
    ) -> Iterator[Shift]:
        """Noisy losses with what has changed at every site, in blocks that fit into memory."""
        known = self.outputs(batch, dropout)
        _check(noise.names, known)
        if missing := known.keys() - clean.keys():
            raise UsageError(
                f"the clean pass has not kept the output of {min(missing)}; make it by "
                "clean(outputs=True)."
            )

        def run(row: Tensor, index: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mode = Shifting(
                *self._model(len(row)),
                sites=self._sites,
                noise=noise,
                index=index,
                scale=scale,
                row=row,
                clean=clean,
            )
            rows, output = self._run(mode, batch, row, dropout)
            return self.engine.row_losses(output, rows), mode.shifts

        def like_them(rows: Tensor) -> object:
            return run(rows, index[:1].expand(len(rows)), scale[:1].expand(len(rows)))

        kept = sum(
            math.prod(site.shape) * torch.promote_types(site.dtype, torch.float32).itemsize
            for site in known.values()
        )

        def block(start: int) -> Shift:
            size = self._block_sizes.plain(batch, like_them, max(kept, self._widest), "shifts")
            some = slice(start, min(start + size, len(row)))
            work = partial(run, row[some], index[some], scale[some])
            return Shift(some, *self._traced(batch, dropout, work))

        start = 0
        while start < len(row):
            # What has been looked at is not asked for again where memory runs out.
            found = self.engine.room.retry(partial(block, start))
            start = found.queries.stop
            yield found
            del found

    def clean(self, batch: Batch, dropout: Key | None, outputs: bool = False) -> Clean:
        """A clean pass that keeps what products need, and the outputs of layers if asked."""

        def run() -> Clean:
            blocks = self._blocks(batch, dropout)
            parts = [self._part(batch, *block, dropout, outputs) for block in blocks]
            return Clean(self.engine, parts)

        # Only outside inference mode do tensors know whether someone has overwritten them.
        with torch.inference_mode(False), torch.no_grad():
            return self._traced(batch, dropout, run)

    def _part(
        self, batch: Batch, start: int, row: Tensor, dropout: Key | None, outputs: bool
    ) -> Part:
        kept: list[Local] = []
        squares: dict[str, tuple[Tensor, Tensor]] = {}
        seen: dict[str, Tensor] = {}

        def take(local: Local, out: Tensor) -> None:
            kept.append(local)
            wide = torch.promote_types(out.dtype, torch.float32)
            # A mask that the model has added to the output is no part of its size.
            masked = out <= torch.finfo(out.dtype).min / 2
            norm = torch.linalg.vector_norm(out.masked_fill(masked, 0), dtype=wide)
            squares[local.site] = (norm.square(), out.numel() - masked.sum())
            if outputs:
                # A copy, because the model may overwrite its own.
                seen[local.site] = out.to(wide, copy=True)

        mode = Gathering(*self._model(len(row)), sites=self._sites, take=take, keep=True)
        rows, output = self._run(mode, batch, row, dropout)
        losses = self.engine.row_losses(output, rows)
        return Part(start, rows, output, losses, kept, squares, mode.last, seen)

    def gather(
        self, batch: Batch, cotangents: Mapping[str, Tensor], dropout: Key | None
    ) -> dict[str, Tensor]:
        """Gradients from a clean pass in which one layer's input is alive at a time."""

        def run() -> dict[str, Tensor]:
            _check(cotangents, self.outputs(batch, dropout))
            gradients: Gradients = {}
            for start, row in self._blocks(batch, dropout):
                take = partial(_multiply, cotangents, gradients, start)
                mode = Gathering(*self._model(len(row)), sites=self._sites, take=take, keep=False)
                self._run(mode, batch, row, dropout)
            return gradients

        return self._traced(batch, dropout, run)

    def _traced(self, batch: Batch, dropout: Key | None, work: Callable[[], T]) -> T:
        """Runs `work` on a traced model, traced again if the batch takes another path."""
        if sequential.mixes_rows(self.engine.model):
            raise UsageError(
                "activation noise needs rows that do not influence each other, but batch "
                "normalisation in training mode mixes them; leave train_mode off."
            )
        try:
            with self.engine.shown(batch, dropout):
                if self._uses is not None:
                    try:
                        return work()
                    except TraceError:
                        pass
                self._trace(batch, dropout)
                return work()
        except TraceError as error:
            raise UsageError(
                f"noise cannot be added to the layers of this model: {error}. Choose an estimator "
                "that perturbs weights."
            ) from error

    def _trace(self, batch: Batch, dropout: Key | None) -> None:
        recorders = []
        params = self.engine.params
        names = {id(value): name for name, value in params.items()}
        for count in (2, 3):
            index = torch.arange(count, device=batch.device) % len(batch)
            # New tensors, because the trace marks them.
            rows = batch.select(index).map(torch.clone)
            recorder = Recorder(names, PRODUCTS)
            recorder.start((rows.args, dict(rows.kwargs)))
            with self._masks(dropout, index), recorder:
                self.engine.model(*rows.args, **rows.kwargs)
            recorders.append(recorder)
        self._uses = compare(*recorders)
        self._widest = -(-recorders[1].widest // 3)
        self._outputs.clear()
        self._survey(batch, dropout, min(2, len(batch)))

    def _survey(self, batch: Batch, dropout: Key | None, rows: int) -> None:
        survey = Survey(*self._model(rows))
        self._run(survey, batch, torch.arange(rows, device=batch.device), dropout)
        self._sites, self.left_out = survey.sites, survey.left_out
        self._outputs[_kind(batch)] = survey.outputs

    def _masks(self, dropout: Key | None, row: Tensor) -> AbstractContextManager[object]:
        return masks(dropout if self.engine.model.training else None, row)

    def _model(self, rows: int) -> tuple[Mapping[str, Tensor], tuple[Use, ...], int]:
        assert self._uses is not None
        return self.engine.params, self._uses, rows

    def _run(self, mode: Pass, batch: Batch, row: Tensor, dropout: Key | None) -> tuple[Batch, Any]:
        rows = batch.select(row)
        with self._masks(dropout, row), mode:
            output = self.engine.model(*rows.args, **rows.kwargs)
        mode.finish()
        return rows, output

    def _blocks(self, batch: Batch, dropout: Key | None) -> Iterator[tuple[int, Tensor]]:
        start, block = 0, self._block(batch, dropout)
        for row in torch.arange(len(batch), device=batch.device).split(block):
            yield start, row
            start += len(row)

    def _block(self, batch: Batch, dropout: Key | None) -> int:
        def run(row: Tensor) -> None:
            rows = batch.select(row)
            with self._masks(dropout, row):
                self.engine.row_losses(self.engine.model(*rows.args, **rows.kwargs), rows)

        # Noise takes a fixed space beside a plain pass.
        return self._block_sizes.plain(batch, run, self._widest)


def _kind(batch: Batch) -> Any:
    """What the shapes of outputs may depend on."""
    tensors = [*batch.args, *(batch.kwargs[name] for name in sorted(batch.kwargs))]
    return tuple((tuple(value.shape[1:]), value.dtype) for value in tensors)


def _check(asked: Any, known: Mapping[str, Any]) -> None:
    for name in asked:
        if name not in known:
            raise UsageError(
                f"{name!r} is no layer's output; the first of them are "
                f"{', '.join(list(known)[:3])}."
            )


def _multiply(
    cotangents: Any, gradients: Gradients, start: int, local: Local, out: Tensor | None = None
) -> None:
    """Adds the product of some rows. A sum over queries forms these alone, also in a ChainMap."""
    for one in getattr(cotangents, "maps", (cotangents,)):
        if local.site in one:
            stop, part = start + local.rows, getattr(one, "part", None)
            c = part(local.site, start, stop) if part else one[local.site][start:stop]
            return local.add(c, gradients)
