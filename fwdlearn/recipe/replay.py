"""The weights of any step of a run, rebuilt from its ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fwdlearn.errors import MissingError, StorageError, UsageError
from fwdlearn.estimator import Estimate
from fwdlearn.gradient import DirectionGradient
from fwdlearn.ledger import snapshots
from fwdlearn.ledger.estimates import body_of, estimate_of, form_of, taken
from fwdlearn.ledger.header import beginning, machine, moved, unlike
from fwdlearn.ledger.journal import (
    LEDGER,
    SNAPSHOTS,
    parent_state,
    warm,
)
from fwdlearn.ledger.records import Ledger, Record
from fwdlearn.ledger.state import State, put_back
from fwdlearn.progress import Journal, Progress
from fwdlearn.recipe.build import Assembly, assemble
from fwdlearn.recipe.folder import course
from fwdlearn.recipe.load import Recipe, load_recipe
from fwdlearn.recipe.weights import save_model


@dataclass(frozen=True)
class Rebuilt:
    """A run after one of its steps.

    Args:
        recipe: of the run.
        assembly: whose model has the weights of that step.
        step: which.
        first: from which state on they were rebuilt, 0 for the first weights.
        made: steps that took forward passes, because their records alone do not tell them.
        at: where the run was.
        moved: how this machine differs from the one of the run, where it may round otherwise.
    """

    recipe: Recipe
    assembly: Assembly
    step: int
    first: int
    made: int
    at: Progress
    moved: str = ""

    def save(self, folder: Path) -> None:
        """Writes the model as a run does."""
        model, built = self.recipe.components["model"], self.assembly.built
        description = {"name": model.name, "target": model.target, "arguments": model.settings}
        save_model(built.module, folder, description, built.save)


def recipe_of(run: Path, keep: bool = False) -> Recipe:
    """The recipe of a run's folder.

    Args:
        run: the folder.
        keep: whether the recipe is to go on in that folder.

    Raises:
        MissingError: the folder holds no run.
    """
    if not (run / "resolved.yaml").exists():
        raise MissingError(f"{run} holds no run (no resolved.yaml); give the folder of a run.")
    words = [f"output.dir={json.dumps(str(run))}", "output.overwrite=false"] if keep else []
    return load_recipe(str(run / "resolved.yaml"), words)


def ledger_of(run: Path) -> Ledger:
    """The ledger of a run's folder, checked.

    Raises:
        MissingError: there is none.
        StorageError: it is damaged.
    """
    if not (run / LEDGER).exists():
        raise MissingError(f"{run} holds no ledger ({LEDGER}): it has not taken a step yet.")
    return Ledger(run / LEDGER)


def replay(
    run: Path,
    step: int | None = None,
    snapshot: bool = True,
    states: bool = False,
    each: Callable[[Record, Estimate], None] = lambda record, estimate: None,
) -> Rebuilt:
    """The run as it was after a step.

    A step whose record holds its coefficients is applied without a forward pass, where all of them
    do; otherwise steps are made again and compared with their records.

    Args:
        run: its folder.
        step: which, the last recorded one when not given; 0 is before the first.
        snapshot: whether to start from a snapshot, where there is one, and not from the beginning.
        states: whether those of estimator and allocator are wanted too, and not the weights alone.
        each: told of every step that is rebuilt, before its update.

    Raises:
        MissingError: the folder holds no run or no ledger.
        UsageError: there is no such step, or the model's first weights are others.
        StorageError: the ledger is damaged, or a step comes out otherwise here.
    """
    recipe, ledger = recipe_of(run), ledger_of(run)
    last = ledger.steps if step is None else step
    begun = ledger.header.get("parent", {"step": 0, "run": ""})
    if not begun["step"] <= last <= ledger.steps:
        before = f"; steps before that are those of {begun['run']}" if begun["step"] else ""
        raise UsageError(
            f"--step must be from {begun['step']} to {ledger.steps}, what {run} has; got {step}"
            f"{before}."
        )
    assembly = assemble(recipe)
    trainer = assembly.trainer
    journal = trainer.journal = _Past(ledger, run, last, snapshot, states)
    with trainer._mode(trainer.train_mode):
        trainer._choose()
        other = unlike(ledger.header, beginning(trainer, course(recipe.resolved())))
        if other.fatal:
            raise UsageError(f"{run} cannot be replayed: {other.fatal}")
        at = journal.resume(trainer, trainer.start())
        first = at.step
        while at.step < last:
            at.step += 1
            made = trainer._made(at)
            journal.append(at, made.estimate)
            each(ledger.record(at.step), made.estimate)
            trainer._advance(at, made, time.monotonic())
            del made
    where = moved(ledger.header["machine"], machine(trainer), journal.made > 0)
    return Rebuilt(recipe, assembly, last, first, journal.made, at, where)


def listed(run: Path) -> list[Record]:
    """The records of a run, with the entries of tables that its batches read.

    Raises:
        as `replay`.
    """
    records: list[Record] = []

    def keep(record: Record, estimate: Estimate) -> None:
        if record.entries is None:
            assert isinstance(estimate.grad, DirectionGradient)
            record = replace(record, entries=estimate.grad.directions.entries)
        records.append(record)

    replay(run, snapshot=False, each=keep)
    return records


class _Past(Journal):
    """Gives steps as they were, and writes nothing."""

    def __init__(self, ledger: Ledger, run: Path, last: int, snapshot: bool, states: bool) -> None:
        self.ledger, self.run, self.last, self.snapshot = ledger, run, last, snapshot
        self.states, self.made = states, 0

    def resume(self, trainer: Any, at: Progress) -> Progress:
        self.trainer = trainer
        self.first = self._newest() if self.snapshot else None
        if self.first is None and "parent" in self.ledger.header:
            self.first = parent_state(self.run, self.ledger)
        start = 0 if self.first is None else int(self.first.meta["step"])
        records = (self.ledger.record(step) for step in range(start + 1, self.last + 1))
        self.told = all(
            record.alone if self.states else record.coefficients is not None for record in records
        )
        if self.first is None:
            return at
        if not self.told:
            warm(trainer)
        return put_back(self.first, trainer)

    def recorded(self, at: Progress) -> Estimate | None:
        if not self.told:
            return None
        return estimate_of(self.ledger.record(at.step), self.ledger.header, self.trainer)

    def append(self, at: Progress, estimate: Estimate) -> None:
        if self.told:
            return
        self.made += 1
        known = self.ledger.record(at.step)
        made = taken(at, estimate, self.trainer, known.alone)
        if known.body() != body_of(made, form_of(self.ledger.header, self.trainer)):
            raise StorageError(
                f"step {at.step} comes out otherwise than its record says: its gradient is no sum "
                "of coefficients, so it has to be made again, and here it rounds otherwise. Replay "
                f"it where it was made: {self.ledger.header['machine']}."
            )

    def _newest(self) -> State | None:
        for step, found in snapshots.valid(self.run / SNAPSHOTS, self.trainer.home.empty):
            if step <= self.last and isinstance(found, snapshots.Snapshot):
                if found.meta["ledger"] == self.ledger.hash(step).hex():
                    return State(found.meta, found.tensors)
        return None
