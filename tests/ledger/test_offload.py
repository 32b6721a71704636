"""Where weights lie is no part of a run: another place goes on with it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fwdlearn.engine import stores
from fwdlearn.ledger import journal
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.replay import replay
from fwdlearn.recipe.run import train
from fwdlearn.recipe.verify import verify
from tests.ledger.killing import ADAM, MOMENTUM, SHORT, left, recipe

CASES = {
    "perturbation": recipe("{name: RandomPerturbation}", ADAM),
    "node-bfloat16": recipe("{name: NodePerturbation, sigma: 0.1}", MOMENTUM, SHORT),
}


class Stopped(Exception):
    """The run is to end here."""


@pytest.fixture(autouse=True)
def as_often_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_COSTS", 0)
    monkeypatch.setattr(stores, "_PAGE", 16)


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_stops_goes_on_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(CASES[name])

    def run(folder: str, offload: str) -> None:
        words = [f"output.dir={tmp_path / folder}", "output.snapshot_seconds=0"]
        train(load_recipe(str(file), [*words, f"trainer.offload={offload}"]))

    run("whole", "null")
    stepped, stops = journal.RunJournal.stepped, [4, 9, 23]

    def stop(self: journal.RunJournal, at: Any) -> None:
        if at.step in stops:
            stops.remove(at.step)
            # Before the snapshot of this step, and after a record that none has seen.
            raise Stopped
        stepped(self, at)

    monkeypatch.setattr(journal.RunJournal, "stepped", stop)
    for offload in ("cpu", str(tmp_path / "weights"), "null"):
        with pytest.raises(Stopped):
            run("moved", offload)
    run("moved", "cpu")
    # Weights, ledger and metrics; the ledger says nothing of where weights lay.
    assert left(tmp_path / "moved") == left(tmp_path / "whole")
    found = verify(tmp_path / "moved", rebuild=True)
    assert all(each.sound for each in found), found
    again = replay(tmp_path / "moved", 12, snapshot=False).assembly.trainer.model
    before = replay(tmp_path / "whole", 12, snapshot=False).assembly.trainer.model
    pairs = zip(again.parameters(), before.parameters(), strict=True)
    assert all(bool((one == other).all()) for one, other in pairs)
