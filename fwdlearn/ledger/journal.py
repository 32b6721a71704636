"""What a run writes down while it trains, and how it comes back by that after any end."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fwdlearn.errors import StorageError, UsageError
from fwdlearn.estimator import Estimate
from fwdlearn.ledger import snapshots
from fwdlearn.ledger.estimates import Taken, body_of, estimate_of, form_of, taken
from fwdlearn.ledger.files import storing
from fwdlearn.ledger.forking import Parent, adopt
from fwdlearn.ledger.header import beginning, family, tensors_of, unlike
from fwdlearn.ledger.records import Ledger, LedgerWriter
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
