"""The trained model from the one that it was and a ledger: no data, no forward pass."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.data import Data, DataInfo
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.ledger.estimates import estimate_of
from fwdlearn.ledger.header import FORMAT, machine, moved, tensors_of
from fwdlearn.ledger.records import Ledger
from fwdlearn.ledger.snapshots import digest
from fwdlearn.local import local_rows
from fwdlearn.progress import Journal, Progress
from fwdlearn.recipe.build import assemble, load_model
from fwdlearn.recipe.load import Recipe, load_recipe
from fwdlearn.recipe.replay import Rebuilt
from fwdlearn.recipe.text import dump
from fwdlearn.recipe.weights import DESCRIPTION
from fwdlearn.recipe.weights import load_model as load_weights


def apply(base: Path | None, path: Path) -> Rebuilt:
    """Applies a ledger.

    Args:
        base: the folder of the model that training began with; None for one that starts from its
            seed.
        path: the ledger.

    Raises:
        MissingError: there is no such ledger or model.
        UsageError: the model is another, a record holds no coefficients, or the ledger's recipe
            names code.
        StorageError: the ledger is damaged.
    """
    if not path.is_file():
        raise MissingError(f"{path} is not there; give a run's ledger.bin.")
    ledger = Ledger(path)
    if ledger.header["format"] != FORMAT:
        raise UsageError(f"{path} has format {ledger.header['format']}, and this reads {FORMAT}.")
    check_whole(ledger)
    recipe = _recipe(ledger.header["recipe"], base, path)
    built = load_model(recipe, _info(ledger.header["info"]))
    if base is not None and (base / DESCRIPTION).exists():
        load_weights(built.module, base)
    rows = Data(_info(ledger.header["info"]), _Absent(ledger.header["data"]["rows"]))
    assembly = assemble(recipe, loaded=(rows, built))
    trainer = assembly.trainer
    _check(ledger, tensors_of(trainer), local_rows(trainer.model, 1), path)
    trainer.journal = _Told(ledger, trainer)
    with trainer._mode(trainer.train_mode):
        at = trainer.start()
        while at.step < ledger.steps:
            at.step += 1
            trainer._advance(at, trainer._made(at), time.monotonic())
    where = moved(ledger.header["machine"], machine(trainer), passes=False)
    return Rebuilt(recipe, assembly, ledger.steps, 0, 0, at, where)


def check_whole(ledger: Ledger) -> None:
    """Raises UsageError unless a ledger and the first weights are all that a run was."""
    if "parent" in ledger.header:
        raise UsageError(
            f"{ledger.path} begins with step {ledger.header['parent']['step']} of another run, "
            "whose state is beside it and not in it; use `fwdlearn replay` on the run's folder."
        )
    for record in ledger:
        if record.coefficients is None:
            raise UsageError(
                f"{ledger.path}: the record of step {record.step} holds no coefficients, because "
                "its gradient is no sum of directions; rebuild such a run with its data (`replay`)."
            )


class _Told(Journal):
    """Gives every step from its record."""

    def __init__(self, ledger: Ledger, trainer: Any) -> None:
        self.ledger, self.trainer = ledger, trainer

    def recorded(self, at: Progress) -> Any:
        return estimate_of(self.ledger.record(at.step), self.ledger.header, self.trainer)


class _Absent:
    """So many rows that nobody has."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def batch(self, index: Tensor) -> Batch:
        raise MissingError("a ledger is applied without its data")


def _check(ledger: Ledger, tensors: Mapping[str, Tensor], learning: int, path: Path) -> None:
    wanted = ledger.header["weights"]
    found = {name: digest(name, value) for name, value in tensors.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise UsageError(
                f"{path} was made on another model: {name} is not what training began with."
            )
    if learning:
        raise UsageError(f"{path}: modules of this model learn from the data; use `replay`.")
    for record in ledger:
        if record.entries is None:
            raise UsageError(
                f"{path}: step {record.step} is about the words that its batch read, and the data "
                "alone tell which; `fwdlearn export RUN --format ledger` makes a file that lists "
                "them."
            )


def _recipe(resolved: Mapping[str, Any], base: Path | None, path: Path) -> Recipe:
    """The recipe in a ledger, which may come from anywhere."""
    code = next(_code(resolved), None)
    if code is not None:
        raise UsageError(f"{path}: its recipe names code, {code!r}; replay its run instead.")
    words = []
    if base is not None and not (base / DESCRIPTION).exists():
        words = [f"model.path={dump(str(base)).strip().splitlines()[0]}"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.yaml"
        file.write_text(dump(dict(resolved)), "utf-8")
        return load_recipe(str(file), words)


def _code(value: Any) -> Any:
    """Names of components that are not registered ones."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key == "name" and isinstance(part, str) and ":" in part:
                yield part
            yield from _code(part)
    elif isinstance(value, list):
        for part in value:
            yield from _code(part)


def _info(held: Mapping[str, Any]) -> DataInfo:
    labels = held["labels"]
    return DataInfo(
        held["kind"],
        tuple(held["shape"]),
        held["classes"],
        None if labels is None else tuple(labels),
        held["values"],
    )
