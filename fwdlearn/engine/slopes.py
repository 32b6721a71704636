"""Exact directional derivatives: which way they are found, and whether it can be trusted.

The rungs, best first: `dual` (K directions beside one pass of plain values), `jvp` (torch's own
forward mode along dense tangents). Some operations drop tangents without a word, so a rung is
used only after its slopes have agreed with differences of losses on the reference pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import sequential
from fwdlearn.engine.choice import Choice
from fwdlearn.engine.dual import Dual, HiddenError
from fwdlearn.engine.dual_rules import DUAL_RULES
from fwdlearn.engine.jvp import Jvp, JvpError, reason
from fwdlearn.engine.layout import SlopePass, slope_passes
from fwdlearn.engine.queries import Queries, masks
from fwdlearn.engine.room import Room
from fwdlearn.engine.trace import Recorder, TraceError, Use, compare
from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.keys import Key

P = ParamSpec("P")
T = TypeVar("T")

SLOPE_RUNGS = ("dual", "jvp")

# The widest activation of a pass with its tangents: what caches hold, what fills a GPU.
_BLOCK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
# Largest difference from differences of losses and from the other rung, relative to the slopes.
_TOLERANCE = {
    torch.float64: (1e-4, 1e-8),
    torch.float32: (5e-2, 1e-3),
    torch.float16: (0.3, 0.1),
    torch.bfloat16: (0.5, 0.2),
}

# Losses of rows together and alone that are further apart, relatively, are those of a model that
# mixes them. A model in float64 may compute in float32 in places.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}

# Of the steps of differences: small ones for kinks, large ones for rounding.
_SIZES = (1e-4, 1e-3, 1e-5, 1e-2, 3e-3, 3e-2, 1e-6, 1e-1)


@cache
def _derivatives_in_inference() -> bool:
    one = torch.ones(())
    with torch.inference_mode():
        return bool(torch.func.jvp(torch.exp, (one,), (one,))[1])


def derivable(method: Callable[P, T]) -> Callable[P, T]:
    """Out of inference mode where torch, before 2.12, has no forward derivative but zero in it."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        leave = torch.is_inference_mode_enabled() and not _derivatives_in_inference()
        with torch.inference_mode(False) if leave else nullcontext(), torch.no_grad():
            return method(*args, **kwargs)

    return run


class Slopes:
    """Losses and slopes of one model.

    Args:
        model: any module; its weights are never written.
        params: name -> trainable tensor.
        row_losses: (output, rows) -> losses [rows].
        rung: "auto", or one of `SLOPE_RUNGS` to insist on it.
        memory_budget: bytes that the activations of a pass and their tangents may take, or None
            for a size that keeps the device busy.
        room: makes passes smaller where memory has run out.

    Attributes:
        choice: the rung in use, once there is one.
        events: every choice so far.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        row_losses: Callable[[object, Batch], Tensor],
        rung: str = "auto",
        memory_budget: int | None = None,
        room: Room | None = None,
    ) -> None:
        if rung not in ("auto", *SLOPE_RUNGS):
            raise UsageError(f"rung must be auto, {' or '.join(SLOPE_RUNGS)}, got {rung!r}.")
        self.model, self.params, self.row_losses = model, params, row_losses
        self.wanted, self.memory_budget, self.room = rung, memory_budget, room or Room()
        self.choice: Choice | None = None
        self.events: list[Choice] = []
        self._names = {id(value): name for name, value in params.items()}
        self._jvp = Jvp(model, params, row_losses, memory_budget or 2**28)
        # None where the rows could not be told apart: then only those with the same directions
        # share a pass.
        self._uses: tuple[Use, ...] | None = None
        self._widest = 1
        # Whether the loss of a row depends on the rows beside it.
        self._mixing = sequential.mixes_rows(model)

    @derivable
    def __call__(
        self,
        batch: Batch,
        row: Tensor,
        directions: Directions,
        direction: Tensor,
        dropout: Key | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses [queries] at the unperturbed point, and their slopes [queries].

        Args:
            row: int64 [queries], may repeat.
            directions: the family.
            direction: int64 [queries], numbers within the family.
            dropout: names the masks of the batch, or None where nothing drops out.

        Raises:
            UsageError: no rung can differentiate the model, or rows influence each other and do
                not share their directions.
        """
        queries = (batch, row, directions, direction, dropout)
        choice = self.choice or self.choose(batch, dropout)
        if choice.rung == "dual":
            try:
                return self._dual(*queries)
            except TraceError:
                pass
            # Another kind of batch may take another path through the model.
            self._trace(batch, dropout)
            try:
                return self._dual(*queries)
            except HiddenError as error:
                raise UsageError(_refused(self.model, [f"dual: {error}"])) from error
            except TraceError as error:
                choice = self.choose(batch, dropout, [f"dual: {error}"])
        try:
            return self._dense(*queries)
        except JvpError as error:
            raise UsageError(_refused(self.model, [f"jvp: {error}"])) from error

    @derivable
    def choose(
        self, batch: Batch, dropout: Key | None = None, failed: Sequence[str] = ()
    ) -> Choice:
        """Checks the rungs on rows of `batch`, best first, and settles on one.

        Args:
            failed: why the rungs above are out of the question.

        Raises:
            UsageError: none is left.
        """
        failed = list(failed)
        wanted = SLOPE_RUNGS if self.wanted == "auto" else (self.wanted,)
        self._mixing = self._rows_mix(batch, dropout)
        if self._mixing:
            self._uses = None
        else:
            self._trace(batch, dropout)
        for rung in wanted[len(failed) :]:
            try:
                agreed = self._check(rung, batch, dropout)
            except (TraceError, JvpError) as why:
                failed.append(f"{rung}: {why}")
                if isinstance(why, HiddenError):
                    break
                continue
            self.choice = Choice(rung, "; ".join([*failed, agreed]))
            self.events.append(self.choice)
            return self.choice
        raise UsageError(_refused(self.model, failed))

    def _dual(
        self,
        batch: Batch,
        row: Tensor,
        directions: Directions,
        direction: Tensor,
        dropout: Key | None,
    ) -> tuple[Tensor, Tensor]:
        def run(some: SlopePass) -> tuple[Tensor, Tensor]:
            self._check_whole(some, batch)
            dual = Dual(self._names, self._uses or (), DUAL_RULES, directions, some.direction)
            try:
                losses = self._losses(batch, some.row, dropout, dual)
            except (TraceError, FwdlearnError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                # What fails without derivatives too is not for this rung to explain.
                self._losses(batch, some.row, dropout, nullcontext())
                raise TraceError(f"{type(error).__name__}: {reason(error)}") from error
            dual.finish()
            slopes = dual.tangent(losses)
            return losses, losses.new_zeros(some.query.shape) if slopes is None else slopes

        private = self._uses is not None
        return _gathered(
            slope_passes(row, direction, self._size(batch, row), private), run, len(row)
        )

    def _losses(
        self, batch: Batch, row: Tensor, dropout: Key | None, within: AbstractContextManager[Any]
    ) -> Tensor:
        """Losses [rows] of one pass run `within` something."""
        rows = batch.select(row)
        with masks(dropout, row), within:
            return self.row_losses(self.model(*rows.args, **rows.kwargs), rows)

    def _dense(
        self,
        batch: Batch,
        row: Tensor,
        directions: Directions,
        direction: Tensor,
        dropout: Key | None,
    ) -> tuple[Tensor, Tensor]:
        def run(some: SlopePass) -> tuple[Tensor, Tensor]:
            self._check_whole(some, batch)
            return self._jvp.run(batch, some, directions, dropout)

        size = self._size(batch, row)
        return _gathered(slope_passes(row, direction, size, private=False), run, len(row))

    def _check_whole(self, some: SlopePass, batch: Batch) -> None:
        if sequential.mixes_rows(self.model):
            sequential.check_whole(some.row, len(batch))
        elif self._mixing and len(some.row) != len(batch):
            raise UsageError(
                f"{type(self.model).__name__} makes the loss of a row depend on the rows beside "
                "it (or on chance), so all rows must share their directions: set the allocator's "
                "sharing to 'shared'."
            )

    def _rows_mix(self, batch: Batch, dropout: Key | None) -> bool:
        """Whether losses of rows differ from those of each row alone by more than rounding."""
        if sequential.mixes_rows(self.model):
            return True
        row = torch.arange(min(3, len(batch)), device=batch.device)
        together, *alone = (
            self._losses(batch, some, dropout, nullcontext()) for some in (row, *row.split(1))
        )
        return _apart(together, torch.cat(alone)) > _ROUNDING.get(self._dtype, 0.2)

    def _size(self, batch: Batch, row: Tensor) -> int:
        """Rows of a pass, each counted once and once more for each direction."""
        if self._mixing:
            return len(row) * (len(row) + 1)
        if self.memory_budget:
            # Some four activations of the widest kind are alive at once.
            return self.room.of(self.memory_budget // (4 * self._widest))
        return self.room.of(_BLOCK_BYTES.get(batch.device.type, 2**28) // self._widest)

    def _trace(self, batch: Batch, dropout: Key | None) -> None:
        recorders = []
        try:
            rules: Any = DUAL_RULES
            for count in (2, 3):
                index = torch.arange(count, device=batch.device) % len(batch)
                # New tensors, because the trace marks them.
                rows = batch.select(index).map(torch.clone)
                recorder = Recorder(self._names, rules)
                recorder.start((rows.args, dict(rows.kwargs)))
                with masks(dropout, index), recorder:
                    self.model(*rows.args, **rows.kwargs)
                recorders.append(recorder)
                self._widest = max(1, -(-recorder.widest // count))
            self._uses = compare(*recorders)
        except TraceError:
            self._uses = None

    def _check(self, rung: str, batch: Batch, dropout: Key | None) -> str:
        """What the slopes agree with."""
        run, failed = (self._dual, TraceError) if rung == "dual" else (self._dense, JvpError)
        whole = self._mixing
        if rung == "dual" and sequential.mixes_rows(self.model):
            raise TraceError("batch normalisation in training mode mixes the rows of the batch")
        row = torch.arange(len(batch) if whole else min(2, len(batch)), device=batch.device)
        row = row.repeat_interleave(2)
        family = Directions(Key.root(0).fold("self-check of slopes"), self.params, len(row))
        number = torch.arange(len(row), device=batch.device)
        # Both kinds of pass: directions that rows share, and directions of their own.
        least, rough = 0.0, False
        for direction in (number % 2,) if whole else (number % 2, number):
            _, found = run(batch, row, family, direction, dropout)
            if not found.any():
                raise failed("no tangent reaches the loss, or it has no slope")
            wide, narrow = _TOLERANCE.get(self._dtype, (0.5, 0.2))
            error, steady = self._difference(batch, row, family, direction, dropout, found, wide)
            if error > wide and steady:
                raise failed(
                    f"its slopes differ from differences of losses by {error:.0e} (allowed: "
                    f"{wide:.0e}): an operation hides its derivative"
                )
            other = self._other(rung, batch, row, family, direction, dropout)
            if error > wide and other is None:
                raise failed("differences of losses are too rough to check its slopes against")
            if other is not None and (apart := _apart(found, other)) > narrow:
                against = self._difference(batch, row, family, direction, dropout, other, wide)
                # Differences decide, where they can tell the two from each other.
                if against[0] <= wide or error > wide:
                    raise failed(f"its slopes differ from those of jvp by {apart:.0e}")
            least, rough = max(least, error), rough or error > wide
        if rough:
            return "equals torch's forward mode; differences of losses are too rough to tell"
        return f"equals differences of losses to {least:.0e}"

    @property
    def _dtype(self) -> torch.dtype:
        dtypes = {value.dtype for value in self.params.values()}
        return min(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))

    def _other(self, rung: str, *queries: Any) -> Tensor | None:
        """The slopes of the other rung, where it runs."""
        if rung != "dual":
            return None
        try:
            slopes = self._dense(*queries)[1]
        except JvpError:
            return None
        return slopes if slopes.isfinite().any() else None

    def _difference(
        self,
        batch: Batch,
        row: Tensor,
        family: Directions,
        direction: Tensor,
        dropout: Key | None,
        found: Tensor,
        tolerance: float,
    ) -> tuple[float, bool]:
        """The least relative difference from central differences of several sizes.

        Returns:
            The difference, and whether it means something: rounding may spoil all of them.
        """
        least, steady = math.inf, False
        found_by: dict[float, Tensor] = {}
        for size in _SIZES:
            sides = []
            for scale in (size, -size):
                scales = torch.full((len(row),), scale, dtype=torch.float64, device=row.device)
                queries = Queries(batch, row, family, direction, scales, dropout)
                sides.append(
                    sequential.run(self.model, self.params, queries, self.row_losses, len(row))
                )
            found_by[size] = (sides[0] - sides[1]).double() / (2 * size)
            least = min(least, _apart(found, found_by[size]))
            if least <= tolerance:
                return least, True
        sizes = sorted(found_by)
        for small, large in zip(sizes, sizes[1:], strict=False):
            apart = _apart(found_by[small], found_by[large])
            # Steps that move no loss agree with each other, and say nothing.
            steady |= apart <= tolerance / 4 and bool(found_by[large].any())
        return least, steady


def _gathered(
    parts: Iterable[SlopePass], run: Callable[[SlopePass], tuple[Tensor, Tensor]], queries: int
) -> tuple[Tensor, Tensor]:
    """Losses [queries] and slopes [queries] of all passes."""
    losses = slopes = None
    for some in parts:
        plain, moved = run(some)
        if losses is None or slopes is None:
            losses = plain.new_empty(queries)
            slopes = moved.new_empty(queries)
        losses[some.query] = plain.expand(some.query.shape)
        slopes[some.query] = moved
    assert losses is not None and slopes is not None
    return losses, slopes


def _apart(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|, over what is finite in `other`."""
    finite = other.isfinite()
    one, other = one[finite].double(), other[finite].double()
    if not len(one):
        return 0.0
    apart = float((one - other).norm() / other.norm().clamp(min=1e-300))
    return math.inf if math.isnan(apart) else apart


def _refused(model: nn.Module, failed: Sequence[str]) -> str:
    return (
        f"{type(model).__name__} gives no exact slopes ({'; '.join(failed)}). Choose an estimator "
        "that needs losses alone (`fwdlearn ls` shows what each one needs)."
    )
