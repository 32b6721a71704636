"""From recipe to trainer: failures point at their section; the rest of the process is untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fwdlearn.errors import FwdlearnError, StorageError
from fwdlearn.recipe.build import _placed, build
from fwdlearn.recipe.load import Recipe, load_recipe

GOOD = """\
model: {name: mlp, hidden: [8]}
data: {name: digits}
estimator: {name: RandomPerturbation}
allocator: {name: Uniform, directions: 2}
optimizer: {name: SGD, lr: 0.1}
trainer: {batch_size: 16, steps: 5}
seed: 3
"""


class Plain(nn.Module):
    """Knows nothing of seeds or data."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.second = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.flatten(1)).relu())


def weighted(output: torch.Tensor, targets: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """An objective with a setting."""
    return factor * nn.functional.cross_entropy(output, targets, reduction="none")


def _recipe(tmp_path: Path, text: str = GOOD, *overrides: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text, "utf-8")
    return load_recipe(str(file), overrides)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """This file as a module that a recipe can name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return Path(__file__).stem


def test_trains_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    summary = build(_recipe(tmp_path)).train()
    assert torch.equal(before, torch.random.get_rng_state())
    assert summary["steps"] == 5
    assert summary["seed"] == 3


def test_the_seed_decides_the_weights(tmp_path: Path, here: str) -> None:
    def weights(*overrides: str) -> torch.Tensor:
        model: Any = build(_recipe(tmp_path, GOOD, *overrides)).model
        return next(model.parameters()).detach().clone()

    for model in ("model={name: mlp, hidden: [8]}", f"model={here}:Plain"):
        assert torch.equal(weights(model), weights(model))
        assert not torch.equal(weights(model), weights(model, "seed=4"))


def test_schedules_get_the_length_of_the_run(tmp_path: Path) -> None:
    for length in ("trainer.steps=7", "~trainer.steps trainer.queries=350"):
        for schedule in ("CosineAnnealingLR", "{name: OneCycleLR, max_lr: 0.1}", "LinearLR"):
            words = [*length.split(), f"optimizer.schedule={schedule}"]
            trainer = build(_recipe(tmp_path, GOOD, *words))
            attribute = {"C": "T_max", "{": "total_steps", "L": "total_iters"}[schedule[0]]
            assert getattr(trainer.schedule, attribute) == trainer.explain()["steps"]
    words = ["optimizer.schedule={name: LinearLR, total_iters: 3}"]
    assert build(_recipe(tmp_path, GOOD, *words)).schedule.total_iters == 3


def test_an_objective_with_settings(tmp_path: Path, here: str) -> None:
    name = f"{here}:weighted"
    plain = build(_recipe(tmp_path, GOOD, f"objective={name}")).evaluate()
    more = build(_recipe(tmp_path, GOOD, f"objective={{name: '{name}', factor: 3}}")).evaluate()
    assert more["loss"] == pytest.approx(3 * plain["loss"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ("[8]", "[-8]"),
            "r.yaml:1:28: model.hidden: mlp(hidden=...) must hold widths of at least 1, got [-8].",
        ),
        (
            ("{name: mlp, hidden: [8]}", "{name: transformers, path: x}"),
            "r.yaml:1:15: model.name: transformers reads text or images, not features",
        ),
        (
            ("{name: digits}", "{name: digits, test_fraction: 2}"),
            "r.yaml:2:37: data.test_fraction: digits(test_fraction=...)",
        ),
        (("name: SGD", "name: Muon"), "r.yaml:5:19: optimizer.name: Muon"),
        (
            ("steps: 5", "steps: 5, rung: fastest"),
            "r.yaml:6:43: trainer.rung: ",
        ),
        (
            ("steps: 5", "queries: 5"),
            "r.yaml:6:36: trainer.queries: Trainer(queries=5) is less than one step",
        ),
    ],
)
def test_failures_point_at_their_section(
    change: tuple[str, str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(GOOD.replace(*change), "utf-8")
    with pytest.raises(FwdlearnError) as caught:
        build(load_recipe("r.yaml"))
    message = str(caught.value)
    if "transformers" in line:
        assert message.startswith("r.yaml:1:")
    else:
        assert message.startswith(line)
    assert "\n" not in message


def test_a_model_that_its_device_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fwdlearn.recipe.build.free_bytes", lambda device: 2**20)
    model, checked = nn.Linear(1024, 1024), _recipe(tmp_path)
    with pytest.raises(FwdlearnError, match=r"r\.yaml:6:1: trainer: .* set trainer\.offload=cpu"):
        _placed(checked, model, "meta")
    assert model.weight.device.type == "cpu"
    # What is there already needs no more room.
    assert _placed(checked, model, "cpu") is model


def test_offload_and_what_it_does_not_go_with(tmp_path: Path) -> None:
    trainer = build(_recipe(tmp_path, GOOD, f"trainer.offload={tmp_path / 'weights'}"))
    assert trainer.explain()["memory_parts"]["weights"] == 0
    for words, why in (
        (("trainer.offload=cpu", "trainer.compile=true"), "trainer: compile=True makes graphs"),
        (("trainer.offload=3",), "trainer.offload: must be text"),
    ):
        with pytest.raises(FwdlearnError, match=why):
            build(_recipe(tmp_path, GOOD, *words))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file: cannot be used"):
        build(_recipe(tmp_path, GOOD, f"trainer.offload={tmp_path / 'file'}"))
