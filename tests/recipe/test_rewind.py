"""Numbers that go wrong: the run stops with advice, and its last good weights are there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fwdlearn.cli import main
from fwdlearn.errors import NonFiniteError, UsageError
from fwdlearn.ledger.records import Ledger
from fwdlearn.recipe.rewind import last_good
from fwdlearn.recipe.weights import read_model
from tests.ledger.killing import recipe
from tests.test_trainer import trainer, weights

GUESS = "{name: ForwardGradient, guess: momentum}"
# Adam moves by the rate and SGD along the gradient, so the first climbs and the second bursts.
CLIMBS = "{name: Adam, lr: 0.01, schedule: {name: LinearLR, start_factor: 0.01, end_factor: 1}}"


def _diverging(optimizer: str, estimator: str = "{name: RandomPerturbation}") -> str:
    return recipe(estimator, optimizer).replace("log_every: 7", "log_every: 5")


def _train(folder: Path, text: str, *words: str) -> tuple[int, dict[str, Any]]:
    (folder / "r.yaml").write_text(text)
    status = main(["train", str(folder / "r.yaml"), f"output.dir={folder}/run", "--quiet", *words])
    return status, json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.parametrize("estimator", ["{name: RandomPerturbation}", GUESS])
def test_a_run_that_bursts_goes_back_to_its_last_good_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], estimator: str
) -> None:
    text = _diverging("{name: SGD, lr: 1e6}", estimator)
    status, summary = _train(tmp_path, text, "output.snapshot_seconds=0")
    assert status == 4 and summary["status"] == "diverged" and summary["good_step"] == 0
    said = capsys.readouterr().err
    assert "train RECIPE optimizer.lr=300000 output.dir=NEW" in said and "Traceback" not in said
    # Every step is there still, and the command says the same again.
    steps = Ledger(tmp_path / "run" / "ledger.bin").steps
    assert steps >= 1
    assert _train(tmp_path, text, "output.snapshot_seconds=0")[0] == 4
    assert capsys.readouterr().err == said
    assert Ledger(tmp_path / "run" / "ledger.bin").steps == steps


@pytest.mark.parametrize("estimator", ["{name: RandomPerturbation}", GUESS])
def test_a_run_that_climbs_is_stopped_and_rewound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], estimator: str
) -> None:
    text = _diverging(CLIMBS, estimator).replace("steps: 30", "steps: 400")
    status, summary = _train(tmp_path, text.replace("lr: 0.01", "lr: 3.0"))
    said = capsys.readouterr().err
    assert status == 4 and summary["status"] == "diverged"
    assert "training has diverged: the loss is" in said and "was 2." in said
    good = summary["good_step"]
    losses = [record.loss for record in Ledger(tmp_path / "run" / "ledger.bin")]
    assert 0 < good < len(losses) < 400
    assert losses[good] <= losses[0] and min(losses[good + 1 :]) > losses[good]
    assert f"optimizer.lr=1 --fork {tmp_path}/run --step {good}" in said
    assert main(["replay", f"{tmp_path}/run", "--step", str(good), "--out", f"{tmp_path}/at"]) == 0
    saved, again = read_model(tmp_path / "run" / "model"), read_model(tmp_path / "at")
    assert all(torch.equal(saved[name], again[name]) for name in again)
    out = tmp_path / "out.safetensors"
    assert main(["export", f"{tmp_path}/run", "--out", str(out)]) == 0
    # The rule is a setting.
    status, summary = _train(
        tmp_path,
        text.replace("lr: 0.01", "lr: 3.0"),
        "trainer.divergence=null",
        "output.overwrite=true",
    )
    assert status == 0 and summary["status"] == "finished"


def test_last_good() -> None:
    nan = math.nan
    assert last_good([], 3) == 0
    assert last_good([2.0], 3) == 0
    assert last_good([2.0, nan], 1) == 0
    assert last_good([2.0, 1.0, 0.5, 0.6, nan], 2) == 3
    # Where it never was lower than at first, no later than it was as low.
    assert last_good([2.0, 3.0, 1.9, 9.0, 80.0], 3) == 2
    assert last_good([-2.0, -5.0, -4.0, 9.0, 80.0], 1) == 2


def test_the_rule_of_divergence() -> None:
    run = trainer(steps=12, log_every=4, lr=0.0)
    at = run.start()
    at.step, at.first = 4, 0.5
    for loss, stops in ((10.4, False), (10.6, True), (math.nan, False)):
        at.last = {"train.loss": loss}
        if stops:
            with pytest.raises(NonFiniteError, match=r"loss is 10.6, and was 0.5 at the start"):
                run._check_course(at)
        else:
            run._check_course(at)
    assert trainer(divergence=None).train()["status"] == "finished"
    with pytest.raises(UsageError, match=r"Trainer\(divergence=...\) must be positive, got 0"):
        trainer(divergence=0)


def test_without_a_folder_the_error_comes_and_weights_are_as_they_were() -> None:
    run = trainer(lr=1e30, steps=12)
    before = weights(run.model)
    with pytest.raises(NonFiniteError):
        run.train()
    assert not torch.equal(weights(run.model), before)
