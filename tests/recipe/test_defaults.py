"""Where `fwdlearn tune` begins: published settings, and nothing that jumps."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fwdlearn.cli import main
from fwdlearn.recipe.defaults import SIGMAS, default_rate, default_sigma, trained_part
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.tune import tune

# What was trained, numbers, directions a step, momentum, and the rates that work.
ANCHORS = [
    ("all weights", 28_938, 20, 0.9, 3e-4, 3e-3),
    ("all weights", 125_000_000, 5, 0.0, 5e-6, 1e-5),
    ("all weights", 355_000_000, 1, 0.0, 1e-7, 1e-5),
    ("all weights", 1_300_000_000, 1, 0.0, 1e-7, 1e-6),
    ("all weights", 13_000_000_000, 1, 0.0, 1e-7, 1e-6),
    ("all weights", 66_000_000_000, 1, 0.0, 1e-7, 1e-6),
    ("adapters", 6_500_000, 1, 0.0, 5e-5, 1e-4),
    ("adapters", 800_000, 1, 0.0, 5e-5, 1e-4),
    ("a prompt", 1_000_000, 1, 0.0, 1e-3, 1e-2),
]
ADAM = [(4_810, 1e-2), (37_472, 3e-3), (113_674, 2e-3), (355_000_000, 5e-5)]
PUBLISHED = {"all weights": 1e-3, "adapters": 1e-2, "a prompt": 1e-1}


@pytest.mark.parametrize(("part", "entries", "directions", "momentum", "low", "high"), ANCHORS)
def test_rates_are_those_that_were_published(
    part: str, entries: int, directions: int, momentum: float, low: float, high: float
) -> None:
    found = default_rate("SGD", part, entries, directions, momentum)
    assert found is not None and low <= found.value <= high
    assert part in found.reason and "SGD" in found.reason


@pytest.mark.parametrize(("entries", "rate"), ADAM)
def test_normalised_steps_have_those_of_the_recipes(entries: int, rate: float) -> None:
    for name in ("Adam", "NormalizedSGD"):
        found = default_rate(name, "all weights", entries, 100)
        assert found is not None and rate / 2 < found.value < 2 * rate


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("part", list(SIGMAS))
def test_more_numbers_never_have_a_larger_rate_and_more_directions_no_smaller(
    optimizer: str, part: str
) -> None:
    sizes, counts = [10**n for n in range(12)], [1, 4, 64, 4096]
    found = {
        (size, count): made.value
        for size, count in itertools.product(sizes, counts)
        if (made := default_rate(optimizer, part, size, count)) is not None
    }
    assert len(found) == len(sizes) * len(counts)
    for (size, count), value in found.items():
        assert 1e-7 <= value <= 0.1
        assert value >= found.get((10 * size, count), 0)
        assert value >= found.get((size, count // 4), 0) or count == 64
    plain, heavy = (default_rate("SGD", part, 10**6, 1, m) for m in (0.0, 0.9))
    assert plain is not None and heavy is not None
    assert heavy.value == pytest.approx(plain.value / 10)


def test_sigmas() -> None:
    for part, value in PUBLISHED.items():
        assert default_sigma(part, torch.float32).value == value
        assert default_sigma(part, torch.float16).value == value
    assert default_sigma("all weights", torch.bfloat16).value == 1e-2
    assert "bfloat16, where less is lost" in default_sigma("all weights", torch.bfloat16).reason
    assert default_sigma("a prompt", torch.bfloat16).value == 1e-1


def test_parts_are_told_by_what_is_trained() -> None:
    for names, entries, total, part in (
        (["0.weight", "0.bias"], 100, 100, "all weights"),
        (["classifier.weight"], 4, 100, "a head"),
        (["encoder.q.lora_A", "classifier.weight"], 4, 100, "adapters"),
        (["prompt", "head.weight"], 4, 100, "a prompt"),
        (["layers.0.q_proj.factor"], 4, 100, "scales"),
    ):
        assert trained_part(names, entries, total) == part


def test_of_an_optimizer_that_is_not_known_there_is_no_default() -> None:
    assert default_rate("Adadelta", "all weights", 100) is None


RECIPE = """\
model: {name: mlp, hidden: [8]}
data: {name: digits}
estimator: RandomPerturbation
optimizer: SGD
trainer: {batch_size: 32, steps: 100}
"""


def test_a_recipe_without_rate_and_sigma_begins_there_and_is_written_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE, "utf-8")
    assert main(["tune", "r.yaml", "--seconds", "1", "--out", "tuned.yaml"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    # 64 x 8 + 8 and 8 x 10 + 10 numbers; 32 rows with 4 directions of their own.
    assert "begins with lr 0.1 for SGD: all weights, 610 trained numbers, 128 directions" in said
    assert "begins with sigma 0.001 for all weights in float32" in said
    assert "largest stable rate seen" in said and "standing still: 2.3" in said
    assert "gradient of a step: signal to noise" in said
    settings = load_recipe("tuned.yaml").source.data
    assert settings["estimator"]["sigma"] > 0 and settings["optimizer"]["lr"] > 1e-3
    found = tune("r.yaml", ["optimizer.lr=0.05", "estimator.sigma=0.02"], seconds=0.5)
    assert found.begun == ()
    assert any(one.value == pytest.approx(0.05) for one in found.rates)
    assert any(one.value == pytest.approx(0.02) for one in found.sigmas)
    assert found.stable is not None
    assert all(one.loss > found.still for one in found.rates if one.value > found.stable)
