"""FrankWolfe in a recipe: its set is a component of its own, also in groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fwdlearn.cli.app import app
from fwdlearn.errors import RecipeError
from fwdlearn.optim import FrankWolfe
from fwdlearn.optim.sets import L1Ball, L2Ball, NuclearBall, Simplex
from fwdlearn.recipe.build import build
from fwdlearn.recipe.load import Recipe, load_recipe

GOOD = """\
model: {name: mlp, hidden: [8]}
data: {name: digits}
estimator: {name: RandomPerturbation}
allocator: {name: Uniform, directions: 2}
optimizer:
  name: FrankWolfe
  set: {name: L1Ball, radius: 30}
  averaging: dimension
  groups:
    "*.bias": {set: {name: L2Ball, radius: 0.5}}
trainer: {batch_size: 16, steps: 5}
seed: 3
"""


def _recipe(tmp_path: Path, text: str = GOOD, *overrides: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text, "utf-8")
    return load_recipe(str(file), overrides)


def test_trains_inside_the_sets(tmp_path: Path) -> None:
    trainer = build(_recipe(tmp_path, GOOD, "optimizer.schedule=CosineAnnealingLR"))
    assert isinstance(trainer.optimizer, FrankWolfe)
    assert trainer.train()["steps"] == 5
    for name, parameter in trainer.engine.params.items():
        region: Any = L2Ball(0.5) if name.endswith("bias") else L1Ball(30.0)
        assert region.contains(parameter.detach())
        assert trainer.optimizer.state[parameter]["step"] == 5
    assert trainer.optimizer.gap > 0
    assert trainer.explain()["memory_bytes"] > 0


@pytest.mark.parametrize(
    ("overrides", "tangents"),
    [
        ((), 32),
        (("allocator.sharing=shared",), 2),
        (("estimator=ProjectedForwardGradient",), 2),
        (("optimizer.tangents=5",), 5),
    ],
)
def test_the_trainer_tells_how_many_tangents_there_are(
    overrides: tuple[str, ...], tangents: int, tmp_path: Path
) -> None:
    trainer = build(_recipe(tmp_path, GOOD, *overrides))
    trainer.train()
    assert [group["tangents"] for group in trainer.optimizer.param_groups] == [tangents] * 2


def test_records_tell_the_gap(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []

    class Sink:
        def start(self, message: dict[str, Any]) -> None: ...

        def finish(self, message: dict[str, Any]) -> None: ...

        def log(self, message: dict[str, Any]) -> None:
            records.append(message)

    trainer = build(_recipe(tmp_path))
    trainer.sinks = (Sink(),)
    trainer.train()
    assert isinstance(trainer.optimizer, FrankWolfe)
    gaps = [record["optimizer.gap"] for record in records if "optimizer.gap" in record]
    assert gaps == [trainer.optimizer.gap]


@pytest.mark.parametrize(
    ("override", "region"),
    [
        ("optimizer.set.radius=7", L1Ball(7.0)),
        ("optimizer.set=Simplex", Simplex()),
        ("optimizer.set={name: NuclearBall, radius: 2, iterations: 4}", NuclearBall(2.0, 4)),
        ("optimizer.set={name: 'fwdlearn.optim.sets:L2Ball', radius: 2}", L2Ball(2.0)),
    ],
)
def test_sets_on_the_command_line(override: str, region: Any, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, GOOD, override)
    assert recipe.components["optimizer"].arguments["set"] == region
    again = _recipe(tmp_path, recipe.to_yaml())
    assert again.resolved() == recipe.resolved()
    assert again.components["optimizer"].arguments == recipe.components["optimizer"].arguments | {
        key: recipe.components["optimizer"].settings[key]
        for key in ("lr", "step_size", "delay", "tangents", "dimension")
    }
    assert again.groups["*.bias"].arguments == {"set": L2Ball(0.5)}


def test_defaults_of_a_set_are_in_the_resolved_recipe(tmp_path: Path) -> None:
    resolved = _recipe(tmp_path, GOOD.replace("{name: L1Ball, radius: 30}", "Simplex")).resolved()
    assert resolved["optimizer"]["set"] == {"name": "Simplex", "total": 1.0}
    assert resolved["optimizer"]["groups"] == {"*.bias": {"set": {"name": "L2Ball", "radius": 0.5}}}


ALL = "L1Ball, L2Ball, LInfBall, LpBall, KSparsePolytope, NuclearBall, SpectralBall, Simplex, Box"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ("radius: 30", "radius: -30"),
            "7:31: optimizer.set.radius: L1Ball(radius=...) must be positive, got -30.0.",
        ),
        (
            ("radius: 30", "radius: wide"),
            "7:31: optimizer.set.radius: must be a number, got 'wide'",
        ),
        (
            ("radius: 30", "raduis: 30"),
            "7:23: optimizer.set.raduis: unknown argument; did you mean 'radius'?",
        ),
        (
            ("name: L1Ball", "name: L1Bal"),
            "7:15: optimizer.set.name: unknown set 'L1Bal'; did you mean 'L1Ball'?",
        ),
        (
            ("{name: L1Ball, radius: 30}", "L1Bal"),
            "7:3: optimizer.set.name: unknown set 'L1Bal'; did you mean 'L1Ball'?",
        ),
        (
            ("{name: L1Ball, radius: 30}", "30"),
            "7:8: optimizer.set: must be a name, or `name:` and arguments, got 30; choose from "
            + ALL,
        ),
        (
            ("  set: {name: L1Ball, radius: 30}\n", ""),
            "5:1: optimizer.set: missing; add it to the file, or optimizer.set=SET on the command "
            "line",
        ),
        (
            ("averaging: dimension", "averaging: dimensions"),
            "8:14: optimizer.averaging: must be one of dimension, classical or a number or null, "
            "got 'dimensions'; did you mean 'dimension'?",
        ),
        (
            ("averaging: dimension", "averaging: 2"),
            "8:14: optimizer.averaging: FrankWolfe(averaging=...) must be 'dimension', "
            "'classical', a constant in (0, 1] or None, got 2.0.",
        ),
        (
            ("radius: 0.5", "radius: 0"),
            "10:44: optimizer.groups.*.bias.set.radius: L2Ball(radius=...) must be positive, "
            "got 0.0.",
        ),
    ],
)
def test_mistakes_name_their_place(
    change: tuple[str, str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(GOOD.replace(*change), "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    lines = str(caught.value).splitlines()
    assert any(each.startswith("r.yaml:" + line) for each in lines)
    # A misspelt argument that is required is missing too.
    assert len(lines) == 1 + ("raduis" in line)


def test_a_missing_radius_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"optimizer.set.radius: missing; add it to the file"):
        _recipe(tmp_path, GOOD, "optimizer.set=L1Ball")


def test_listed() -> None:
    runner = CliRunner()
    optimizers = runner.invoke(app, ["ls", "optimizers"]).output
    assert "FrankWolfe" in optimizers and "averaged gradients" in optimizers
    sets = runner.invoke(app, ["ls", "sets"]).output
    assert [line.split()[0] for line in sets.splitlines()] == ALL.split(", ")
