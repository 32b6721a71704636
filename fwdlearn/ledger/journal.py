"""What a run writes down while it trains, and how it comes back by that after any end."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fwdlearn.allocator import Allocator
from fwdlearn.directions import Directions, ReadParams
from fwdlearn.engine.offload import on_device
from fwdlearn.errors import StorageError, UsageError
from fwdlearn.estimator import Estimate
from fwdlearn.gradient import DirectionGradient, used_in
from fwdlearn.ledger import snapshots
from fwdlearn.ledger.files import storing
from fwdlearn.ledger.forking import Parent, adopt
from fwdlearn.ledger.header import beginning, family, tensors_of, unlike
from fwdlearn.ledger.records import Ledger, LedgerWriter, Record, packed
from fwdlearn.ledger.state import State, held, put_back, unpacked
from fwdlearn.progress import Journal, Progress

if TYPE_CHECKING:
    from fwdlearn.trainer import Trainer

LEDGER, SNAPSHOTS, PARENT = "ledger.bin", "snapshots", "parent.safetensors"
# How many times what it costs passes between two snapshots, and between two writes of records.
_COSTS, _WRITES = 50, 200
# Records that wait to be written.
_MOST = 100


class Lines(Protocol):
    """The file of metrics, which goes back together with the run."""

    path: Path
    keep: int

    def sync(self) -> int: ...


class RunJournal(Journal):
    """The ledger and the snapshots of a run folder.

    Going on takes the newest snapshot that is sound, and the records after it. A step whose record
    tells all of it is applied from there, without a forward pass; any other is made again, which
    gives the same because all chance is named by (seed, step), and compared with its record.

    Args:
        folder: the run's.
        recipe: what decides the course of the run, as plain values; kept in the ledger.
        metrics: cut back to where the run goes on.
        say, warn: told, in one line each, where that is, and what stood in the way.
        seconds: between snapshots, at least: what a run that goes on has to make again.
        whole: around each update; see `Journal`.
        parent: a run that this one begins with, if it has not begun yet.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, Any],
        metrics: Lines | None = None,
        say: Callable[[str], None] = lambda message: None,
        warn: Callable[[str], None] = lambda message: None,
        seconds: float = 60.0,
        whole: Callable[[], AbstractContextManager[object]] = nullcontext,
        parent: Parent | None = None,
    ) -> None:
        self.whole, self.parent = whole, parent
        self.folder, self.recipe, self.metrics = folder, recipe, metrics
        self.say, self.warn, self.seconds = say, warn, seconds
        self._ledger: Ledger | None = None
        self._writer: LedgerWriter | None = None
        self._header: dict[str, Any] = {}
        self._due = math.inf
        self._tried = False
        self._waiting: list[Taken] = []
        self._write_due = 0.0

    def resume(self, trainer: Trainer, at: Progress) -> Progress:
        """See `Journal.resume`.

        Raises:
            StorageError: the ledger is damaged before its end.
            UsageError: the run began with other weights or data.
        """
        self._trainer, path = trainer, self.folder / LEDGER
        self._choice = trainer.engine.choice
        self._header = beginning(trainer, self.recipe)
        self._due = time.monotonic() + self.seconds
        if not path.exists():
            if self.parent is None:
                return at
            self._fork(self.parent, trainer)
            # It need not be held beside what has come of it.
            self.parent = None
        ledger = self._ledger = Ledger(path)
        other = unlike(ledger.header, self._header)
        if other.fatal:
            raise UsageError(f"{self.folder} cannot be gone on with: {other.fatal}")
        if other.rounding and ledger.steps:
            self.warn(
                f"{other.rounding}; what is computed from here on may round otherwise than it "
                "would have"
            )
        self._header = ledger.header
        if ledger.torn:
            self.say(f"{path}: the last record was cut short ({ledger.torn} bytes), and is left")
        if ledger.steps:
            warm(trainer)
        found = self._newest(ledger)
        came = "the first step" if found is None else f"the snapshot of step {found.meta['step']}"
        if found is None and "parent" in ledger.header:
            found = parent_state(self.folder, ledger)
            came = f"step {found.meta['step']} of {ledger.header['parent']['run']}"
        if found is not None:
            at = put_back(found, trainer)
        self._choice = trainer.engine.choice
        self._writer = LedgerWriter(path, ledger.end, ledger.hash(ledger.steps))
        self.say(
            f"goes on at step {ledger.steps}: from {came}, "
            f"{ledger.steps - at.step} more from the ledger"
        )
        return at

    def recorded(self, at: Progress) -> Estimate | None:
        """See `Journal.recorded`."""
        if self._ledger is None or at.step > self._ledger.steps:
            return None
        record = self._ledger.record(at.step)
        return estimate_of(record, self._header, self._trainer) if record.alone else None

    def append(self, at: Progress, estimate: Estimate) -> None:
        """See `Journal.append`."""
        trainer, stayed = self._trainer, self._trainer.engine.choice is self._choice
        self._choice = trainer.engine.choice
        if self._writer is None:
            self._header["family"] = family(estimate.grad)
            self._writer = LedgerWriter.create(self.folder / LEDGER, self._header)
        made = taken(at, estimate, trainer, stayed)
        if self._ledger is not None and at.step <= self._ledger.steps:
            known = self._ledger.record(at.step)
            # A step from the ledger may say of itself that it stayed where it was.
            form = form_of(self._header, trainer)
            if known.alone or known.body() == body_of(made, form):
                return
            self._replace_from(self._ledger, at.step)
        self._waiting.append(made)
        # A record of metrics is about to be told of it.
        told = at.step % trainer.log_every == 0
        if told or len(self._waiting) == _MOST or time.monotonic() >= self._write_due:
            self._write()

    def _write(self) -> None:
        """Writes the records that wait. If that fails they are lost, and the file is as it was."""
        assert self._writer is not None
        begun, waiting = time.monotonic(), self._waiting
        self._waiting = []
        form = form_of(self._header, self._trainer)
        self._writer.append(*[body_of(one, form) for one in waiting])
        now = time.monotonic()
        self._write_due = now + _WRITES * (now - begun)

    def stepped(self, at: Progress) -> None:
        """See `Journal.stepped`."""
        if not self._tried:
            self._tried = True
            try:
                first = held(self._trainer, at)
                unpacked(first, first.tensors, self._trainer)
            except (TypeError, ValueError) as error:
                self.warn(f"no snapshots can be made ({error}); going on starts at the first step")
                self.seconds = math.inf
                self._due = math.inf
        if time.monotonic() >= self._due:
            self.snapshot(at)

    def snapshot(self, at: Progress) -> None:
        """Stores all that the run holds now, and what it rests on first."""
        begun = time.monotonic()
        self._write()
        assert self._writer is not None
        self._writer.sync()
        position = self.metrics.sync() if self.metrics is not None else 0
        state = held(self._trainer, at)
        meta = {**state.meta, "ledger": self._writer.running.hex(), "metrics": position}
        known = snapshots.Snapshot(meta, state.tensors)
        snapshots.store(self.folder / SNAPSHOTS, at.step, known)
        now = time.monotonic()
        self._due = now + max(self.seconds, _COSTS * (now - begun))

    def _fork(self, parent: Parent, trainer: Trainer) -> None:
        """Writes what the run begins with: the state first, so that a ledger never lacks it."""
        first = {name: value.clone() for name, value in tensors_of(trainer).items()}
        made = warm(trainer)
        self._header["family"] = family(made.grad)
        at = adopt(parent, trainer)
        state = held(trainer, at)
        with storing(self.folder / PARENT):
            snapshots.write(self.folder / PARENT, snapshots.Snapshot(state.meta, state.tensors))
        self._header["parent"] = {**parent.about, "state": digest_of(self.folder / PARENT)}
        LedgerWriter.create(self.folder / LEDGER, self._header, parent.records).close()
        # As any run that goes on finds it.
        own = tensors_of(trainer)
        with torch.inference_mode():
            for name, value in first.items():
                own[name].copy_(value)

    def close(self) -> None:
        """Makes the ledger durable."""
        if self._writer is not None:
            try:
                self._write()
                self._writer.sync()
            finally:
                writer, self._writer = self._writer, None
                writer.close()

    def _newest(self, ledger: Ledger) -> State | None:
        """The newest snapshot that is sound and belongs to the ledger."""
        for step, found in snapshots.valid(self.folder / SNAPSHOTS, self._trainer.home.empty):
            if isinstance(found, StorageError):
                self.warn(f"{found}; the one before it is taken")
                continue
            known = step <= ledger.steps and found.meta["ledger"] == ledger.hash(step).hex()
            if not known or not self._cut_metrics(found.meta["metrics"]):
                self.warn(f"the snapshot of step {step} does not belong to this run's files")
                continue
            return State(found.meta, found.tensors)
        return None

    def _cut_metrics(self, position: int) -> bool:
        if self.metrics is None:
            return True
        path = self.metrics.path
        if position and (not path.exists() or path.stat().st_size < position):
            return False
        self.metrics.keep = position
        return True

    def _replace_from(self, ledger: Ledger, step: int) -> None:
        self.warn(
            f"step {step} came out otherwise than its record says, on another machine perhaps, or "
            "because something in the step does not repeat; its record and those after it are "
            "written anew"
        )
        assert self._writer is not None
        self._writer.close()
        self._ledger = None
        self._writer = LedgerWriter(ledger.path, ledger.end_of(step - 1), ledger.hash(step - 1))


def parent_state(folder: Path, ledger: Ledger) -> State:
    """What a run began with that began with another.

    Raises:
        StorageError: it is not there, or not as it was written.
    """
    path = folder / PARENT
    found = snapshots.read(path)
    if digest_of(path) != ledger.header["parent"]["state"]:
        raise StorageError(f"{path} is not what the run in {folder} began with.")
    return State(found.meta, found.tensors)


def digest_of(path: Path) -> str:
    """BLAKE2b-128 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def warm(trainer: Trainer) -> Estimate:
    """Lets the engine decide what it decided when the run began, with the weights of then."""
    before = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    start = trainer.start()
    made = trainer._estimate(0, start.state, start.plans)[0]
    with torch.inference_mode():
        for name, buffer in trainer.model.named_buffers():
            buffer.copy_(before[name])
    return made.estimate


def estimate_of(record: Record, header: Mapping[str, Any], trainer: Trainer) -> Estimate:
    """The estimate that a record with coefficients holds.

    Without a forward pass; where its directions are about what the batch reads, the batch is taken
    and its entries are looked up.
    """
    assert record.coefficients is not None
    made = header["family"]
    params: Mapping[str, Tensor] = on_device(trainer.engine.params)
    if (listed := record.entries) is None:
        params = trainer.oracle(record.step - 1).params
    else:
        entries = {name: value.to(trainer.device) for name, value in listed.items()}
        params = ReadParams(params, lambda: entries)
    directions = Directions(
        trainer.step_key(record.step - 1),
        params,
        len(record.coefficients),
        made["law"],
        made["rank"],
        made["scales"],
    )
    coefficients = record.coefficients.to(directions.device)
    info: dict[str, Tensor] = {
        "variance": torch.tensor(record.variance, dtype=torch.float64),
        "nonfinite": torch.tensor(record.nonfinite),
    }
    loss = torch.tensor(record.loss, dtype=torch.float64)
    return Estimate(DirectionGradient(directions, coefficients), loss, record.queries, info)


class Taken(NamedTuple):
    """What the record of a step is made of: quickly taken, and little to keep.

    Args:
        step: from 1.
        queries: of the estimate.
        figures: of the estimate.
        fresh: whether nothing but weights and optimizer lasts to the next step.
        coefficients: along which the gradient is a sum, or None.
        named: whether the directions are those of the step's key, in every parameter.
        law, rank, scales: of them.
        reads: whether they are zero in tables but for what the batch reads.
    """

    step: int
    queries: int
    figures: tuple[float, float, int]
    fresh: bool
    coefficients: Tensor | None = None
    named: bool = False
    law: str = ""
    rank: int | None = None
    scales: Mapping[str, float] | None = None
    reads: bool = False


def taken(at: Progress, estimate: Estimate, trainer: Trainer, stayed: bool) -> Taken:
    """Of the step `at.step`.

    Args:
        at: with the states after the estimate.
        estimate: of the step.
        trainer: that makes the step.
        stayed: whether the engine is on the rung that it was on before the step.
    """
    fresh = stayed and at.state is None and at.plans is None
    begin = (at.step, estimate.queries, estimate.figures, fresh)
    grad = estimate.grad
    if type(grad) is not DirectionGradient or type(made := grad.directions) is not Directions:
        return Taken(*begin)
    about, every = made.params, trainer.engine.params
    named = about is every or about.keys() == every.keys()
    # Asked for here, where the trainer still knows it.
    named = named and made.key == trainer.step_key(at.step - 1)
    family = made.law, made.rank, made.scales
    return Taken(*begin, grad.coefficients, named, *family, bool(made.entries))


class Form(NamedTuple):
    """What a ledger and its trainer say of every record.

    Args:
        family: of the directions whose coefficients tell a gradient.
        dtype: that they are used in.
        lasting: whether the allocator is told of steps.
    """

    family: Mapping[str, Any] | None
    dtype: torch.dtype
    lasting: bool


def form_of(header: Mapping[str, Any], trainer: Trainer) -> Form:
    """Of the records of a ledger with that header."""
    dtype = used_in(value.dtype for value in trainer.engine.params.values())
    lasting = type(trainer.allocator).observe is not Allocator.observe
    return Form(header["family"], dtype, lasting)


def body_of(made: Taken, form: Form) -> bytes:
    """The record, as a ledger of that form has it."""
    coefficients = None
    if made.named and form.family is not None and made.coefficients is not None:
        if {"law": made.law, "rank": made.rank, "scales": made.scales} == form.family:
            # Nothing is lost.
            coefficients = made.coefficients.to("cpu", form.dtype)
    loss, variance, nonfinite = made.figures
    return packed(
        made.step,
        made.queries,
        nonfinite,
        loss,
        variance,
        coefficients is not None and made.fresh and not form.lasting,
        coefficients,
        None if made.reads and coefficients is not None else {},
    )
