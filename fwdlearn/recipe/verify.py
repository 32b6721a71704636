"""Whether the files of a run are what was written, down to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fwdlearn.errors import FwdlearnError, StorageError
from fwdlearn.ledger import snapshots
from fwdlearn.ledger.header import tensors_of
from fwdlearn.ledger.journal import PARENT, SNAPSHOTS, parent_state
from fwdlearn.recipe.folder import course, differences, status
from fwdlearn.recipe.replay import ledger_of, recipe_of, replay
from fwdlearn.recipe.weights import DESCRIPTION, read_model


@dataclass(frozen=True)
class Finding:
    """What was looked at.

    Args:
        what: a file, in words.
        says: what was found.
        sound: whether it is as it was written.
    """

    what: str
    says: str
    sound: bool = True


def verify(run: Path, rebuild: bool = False) -> list[Finding]:
    """Looks at every file that has digests.

    Args:
        run: its folder.
        rebuild: whether to rebuild the last weights from the ledger, and compare.

    Raises:
        MissingError: the folder holds no run, or no ledger.
    """
    recipe = recipe_of(run)
    try:
        ledger = ledger_of(run)
    except StorageError as error:
        return [Finding("ledger", str(error), sound=False)]
    cut = (
        f"; its last {ledger.torn} bytes are of a record that was cut short" if ledger.torn else ""
    )
    found = [Finding("ledger", f"{ledger.steps} steps, {ledger.end} bytes{cut}")]
    other = differences(ledger.header["recipe"], course(recipe.resolved()))
    says = f"not the one that the ledger began with: {'; '.join(other)}" if other else "as begun"
    found.append(Finding("recipe", says, not other))
    if "parent" in ledger.header:
        try:
            parent_state(run, ledger)
            found.append(Finding(PARENT, "sound"))
        except StorageError as error:
            found.append(Finding(PARENT, str(error), sound=False))
    for step, snapshot in snapshots.valid(run / SNAPSHOTS):
        if isinstance(snapshot, StorageError):
            found.append(Finding(f"snapshot of step {step}", str(snapshot), sound=False))
            continue
        known = step <= ledger.steps and snapshot.meta["ledger"] == ledger.hash(step).hex()
        says = "sound" if known else "of another ledger"
        found.append(Finding(f"snapshot of step {step}", says, known))
    saved: dict[str, Tensor] | None = None
    if (run / "model" / DESCRIPTION).exists():
        try:
            saved = read_model(run / "model")
            found.append(Finding("weights", "sound"))
        except FwdlearnError as error:
            found.append(Finding("weights", str(error), sound=False))
    elif (run / "model").is_dir():
        found.append(Finding("weights", "in a format of the model's own, which has no digests"))
    if rebuild:
        found.append(_rebuilt(run, saved if status(run) == "finished" else None))
    return found


def _rebuilt(run: Path, saved: dict[str, Tensor] | None) -> Finding:
    """Whether the ledger gives the weights that were saved."""
    what = "replay"
    try:
        again = replay(run, snapshot=False)
    except StorageError as error:
        return Finding(what, str(error), sound=False)
    says = f"{again.step} steps, {again.made} of them by forward passes"
    if saved is None:
        return Finding(what, f"{says}; there are no finished weights to compare with")
    tensors = tensors_of(again.assembly.trainer)
    for name, value in tensors.items():
        if name in saved and not torch.equal(value.cpu(), saved[name]):
            here = f" ({again.moved})" if again.moved else ""
            return Finding(what, f"{says}; {name} is not what was saved{here}", sound=False)
    return Finding(what, f"{says}; the weights are those that were saved, in every bit")
