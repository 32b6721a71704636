"""Overrides, defaults, the resolved recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwdlearn.errors import RecipeError
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.locate import shipped

GOOD = """\
model: mlp
data: digits
estimator: {name: SPSA, sigma: 0.1}
optimizer: {name: SGD, lr: 0.1, schedule: CosineAnnealingLR}
trainer: {steps: 5, memory_budget: 2 GiB}
tracking: {tensorboard: true, wandb: false}
"""


@pytest.fixture
def good(tmp_path: Path) -> str:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD, "utf-8")
    return str(file)


def _lines(recipe: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value).splitlines()


def test_defaults(good: str) -> None:
    resolved = load_recipe(good).resolved()
    assert resolved["objective"] == {"name": "cross_entropy", "label_smoothing": 0.0}
    assert resolved["allocator"]["name"] == "Uniform"
    assert resolved["trainer"]["memory_budget"] == 2 * 2**30
    assert resolved["optimizer"]["schedule"] == {"name": "CosineAnnealingLR", "eta_min": 0.0}
    assert resolved["tracking"] == {"tensorboard": {"subfolder": "tensorboard"}}
    assert resolved["seed"] == 0


@pytest.mark.parametrize("name", ["quickstart"])
def test_resolved_reads_back_to_the_same(name: str, tmp_path: Path) -> None:
    first = load_recipe(name, ["tracking.wandb.tags=[a, 'no', '1e-4']"])
    file = tmp_path / "resolved.yaml"
    file.write_text(first.to_yaml(), "utf-8")
    second = load_recipe(str(file))
    assert second.resolved() == first.resolved()
    assert second.to_yaml() == first.to_yaml()
    for key, component in first.components.items():
        again = second.components[key]
        assert component.arguments.items() <= again.arguments.items()


def test_overrides(good: str) -> None:
    overrides = [
        "optimizer.lr=1e-4",
        "model.hidden=[3, 4]",
        "~optimizer.schedule",
        "~trainer.steps",
        "trainer.queries=1000",
        "tracking.wandb.project=a=b",
        "objective=zero_one",
        "output.dir=runs/x",
    ]
    recipe = load_recipe(good, overrides)
    resolved = recipe.resolved()
    assert resolved["optimizer"]["lr"] == 1e-4
    assert resolved["model"]["hidden"] == [3, 4]
    assert "schedule" not in resolved["optimizer"]
    assert resolved["trainer"]["queries"] == 1000
    assert resolved["tracking"]["wandb"]["project"] == "a=b"
    assert resolved["tracking"]["wandb"]["mode"] == "offline"
    assert resolved["objective"] == {"name": "zero_one"}
    assert resolved["output"]["dir"] == "runs/x"


def test_an_argument_of_a_component_named_in_short(good: str) -> None:
    recipe = load_recipe(good, ["model.hidden=[5]"])
    assert recipe.components["model"].name == "mlp"
    assert recipe.components["model"].arguments == {"hidden": [5]}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr=fast", "optimizer.lr: must be a number, got 'fast'"),
        ("trainer.stpes=1", "trainer.stpes: unknown key; did you mean 'steps'?"),
        ("lr=1", "lr: unknown section; did you mean 'optimizer.lr'?"),
        ("estimator.sgima=1", "estimator.sgima: unknown argument; did you mean 'sigma'?"),
        ("estimator=SPSAA", "estimator.name: unknown estimator 'SPSAA'; did you mean 'SPSA'?"),
        ("estimator.sigma=0", "estimator.sigma: SPSA(sigma=...) must be positive, got 0.0."),
        (
            "~trainer.stps",
            "trainer.stps: not in the recipe, so it cannot be removed; did you mean 'steps'?",
        ),
        (
            "~nothing.here",
            "nothing.here: 'nothing' is not in the recipe; see `fwdlearn validate` "
            "for what is there",
        ),
        (
            "seed.x=1",
            "seed.x: 'seed' holds a value, not keys; see `fwdlearn validate` for what is there",
        ),
        ("abc", "abc: not understood; write key=value, or ~key to remove a key"),
        ("~seed=1", "~seed=1: not understood; write key=value, or ~key to remove a key"),
        ("=3", "=3: not understood; write key=value, or ~key to remove a key"),
        (
            "model.hidden=[3",
            "model.hidden: '[3': not well-formed YAML: expected ',' or ']', but "
            "got '<stream end>' (while parsing a flow sequence); check indentation, colons and "
            "quotes",
        ),
        ("~model", "model: missing; every recipe needs this section"),
    ],
)
def test_mistakes_on_the_command_line(good: str, override: str, line: str) -> None:
    first = ["seed=0"] if override == "seed.x=1" else []
    assert _lines(good, *first, override) == [f"command line: {line}"]


def test_mistakes_of_file_and_command_line_come_together(good: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(GOOD.replace("steps", "stpes"), "utf-8")
    assert _lines(str(file), "estimator.sgima=1") == [
        f"{file}:5:11: trainer.stpes: unknown key; did you mean 'steps'?",
        "command line: estimator.sgima: unknown argument; did you mean 'sigma'?",
    ]


def test_shipped_recipes_open_with_purpose_and_command() -> None:
    for name, text in shipped().items():
        assert text.startswith("# ")
        assert f"#   fwdlearn train {name}" in text


def test_a_shipped_recipe_that_needs_a_path_says_so() -> None:
    (line,) = _lines("movie-reviews-minilm")
    assert line.startswith("movie-reviews-minilm.yaml:")
    assert line.endswith(
        ": data.path: missing; add it to the file, or data.path=PATH on the command line"
    )
