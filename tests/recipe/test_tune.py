"""`fwdlearn tune`: what it finds on a small network, and that it says what it cannot find."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fwdlearn.cli import main
from fwdlearn.errors import UsageError
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.tune import tune

TINY = """\
model: {name: mlp, hidden: [8]}
data: {name: digits}
estimator: {name: RandomPerturbation}
allocator: {name: Uniform, directions: 4}
optimizer: {name: Adam, lr: 1e-4, schedule: {name: CosineAnnealingLR}}
trainer: {batch_size: 32, queries: 100000, evaluate_every: 10, log_every: 5}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY, "utf-8")
    return "tiny.yaml"


def test_a_rate_that_is_far_too_small_grows_and_sigma_lies_where_estimates_agree(tiny: str) -> None:
    found = tune(tiny, seconds=1.0)
    by = {one.value: one.apart for one in found.sigmas}
    assert len(by) == 9 and math.isinf(found.sigmas[0].apart)
    settings = dict(word.split("=") for word in found.words)
    sigma = min(by, key=lambda value: abs(math.log(value / float(settings["estimator.sigma"]))))
    assert by[sigma] <= max(0.05, 2 * min(by.values()))
    # Curvature: with sigma of the size of the weights, an estimate is another one.
    assert found.sigmas[-2].apart > 5 * min(by.values())
    # A tenth of an epoch at 1e-4 learns nothing: the grid is left at its upper end.
    assert float(settings["optimizer.lr"]) > 9e-4
    losses = {one.value: one.loss for one in found.rates}
    assert len(losses) > 5 and min(losses, key=lambda rate: losses[rate]) > 9e-4


def test_a_loss_with_steps_has_no_sigma_to_be_found(tiny: str) -> None:
    found = tune(tiny, ["objective=zero_one"], seconds=0.5)
    assert all(one.apart > 0.5 for one in found.sigmas)
    assert [word.split("=")[0] for word in found.words] == ["optimizer.lr"]


def test_estimators_without_sigma(tiny: str) -> None:
    found = tune(tiny, ["estimator=ForwardGradient"], seconds=0.5)
    assert found.sigmas == () and len(found.words) == 1


def test_where_every_rate_diverges(tiny: str) -> None:
    with pytest.raises(UsageError, match=r"every learning rate from .* diverges; begin with"):
        tune(tiny, ["optimizer.name=SGD", "optimizer.lr=1e36"], seconds=0.5)


def test_the_command(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", tiny, "--seconds", "1", "--out", "tuned.yaml"]) == 0
    said = capsys.readouterr().out
    assert "learning rate: training loss after" in said and "fwdlearn train tuned.yaml" in said
    tuned = load_recipe("tuned.yaml")
    assert tuned.components["optimizer"].settings["lr"] != 1e-4
    assert "optimizer.schedule" in tuned.components
    assert main(["tune", tiny, "--out", "tuned.yaml"]) == 2
    assert "tuned.yaml is there already" in capsys.readouterr().err
    assert main(["tune", tiny, "--seconds", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sigmas"][0]["apart"] is None and facts["steps"] >= 10
