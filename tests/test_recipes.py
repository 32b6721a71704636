"""Every shipped recipe trains on real data, shortened by overrides."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fwdlearn.baselines.pretrain_images import write_untrained
from fwdlearn.data import DataInfo
from fwdlearn.recipe.evaluate import evaluate
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.locate import shipped
from fwdlearn.recipe.run import train
from tests.models.language_models import TEXTS, causal_folder

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "movie-reviews"
FASHION = Path("/usr/share/datasets/fashion-mnist")
# Recipe -> what it takes to run three steps of it.
SHORT = {
    "quickstart": ["trainer.steps=3"],
    "frank-wolfe-digits": ["trainer.steps=3"],
    "digits-threshold": ["trainer.steps=3", "allocator.directions=4"],
    "fashion-mnist-vit": [
        f"data.path={FASHION}",
        "data.train_rows=64",
        "data.evaluation_rows=32",
        "trainer.steps=3",
        "trainer.batch_size=8",
    ],
    "fashion-mnist-cnn": [
        f"data.path={FASHION}",
        "data.train_rows=64",
        "data.evaluation_rows=32",
        "trainer.steps=3",
        "trainer.batch_size=8",
    ],
    "movie-reviews-minilm": [
        f"data.path={SHARED}",
        "data.train_rows=64",
        "data.evaluation_rows=32",
        "trainer.steps=3",
        "trainer.batch_size=2",
        "allocator.directions=2",
    ],
    "movie-reviews-reader": [
        f"data.path={SHARED}",
        "data.train_rows=64",
        "data.evaluation_rows=32",
        "trainer.steps=3",
        "trainer.batch_size=8",
    ],
    "fashion-mnist-tuning": [
        f"data.path={FASHION}",
        "data.train_rows=64",
        "data.evaluation_rows=32",
        "trainer.steps=3",
        "trainer.batch_size=8",
        "allocator.directions=2",
    ],
    "vit-transfer": [
        f"data.path={FASHION}",
        "model.path=FOLDER/vit",
        "data.train_rows=64",
        "data.evaluation_rows=32",
        "trainer.steps=3",
        "trainer.batch_size=8",
    ],
    "delayed-recall": ["trainer.steps=3"],
    "copying-memory": ["trainer.steps=3"],
    "mackey-glass": ["trainer.steps=3"],
    "adding-problem": ["trainer.steps=3"],
    "sequential-digits": ["trainer.steps=3", "trainer.batch_size=16"],
    "character-lm": ["data.path=FOLDER/text.txt", "trainer.steps=3", "trainer.batch_size=16"],
    "causal-lm": [
        "model.path=FOLDER/lm",
        "data.path=FOLDER/text.txt",
        "~trainer.queries",
        "trainer.steps=3",
        "trainer.batch_size=4",
        "allocator.directions=2",
    ],
    "reward": [
        "model.path=FOLDER/lm",
        "data.path=FOLDER/text.jsonl",
        "data.evaluation_fraction=0.5",
        "data.new_tokens=4",
        "trainer.steps=3",
        "trainer.batch_size=4",
        "allocator.directions=2",
    ],
    "csv-forecast": ["data.path=FOLDER/series.csv", "data.target=load", "trainer.steps=3"],
    "movie-reviews-prompt": [
        f"data.path={SHARED}",
        "data.train_rows=64",
        "data.evaluation_rows=32",
        "trainer.steps=3",
        "trainer.batch_size=4",
        "allocator.directions=2",
    ],
}


def test_every_recipe_is_here() -> None:
    assert set(SHORT) == set(shipped())


@pytest.mark.parametrize("name", list(SHORT))
def test_recipe_trains_and_evaluates(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A row is one example. " * 40, "utf-8")
    lines = [f"{day},{day * 7 % 11},{day * day % 13}" for day in range(300)]
    (tmp_path / "series.csv").write_text("\n".join(["day,load,wind", *lines]) + "\n", "utf-8")
    rows = [json.dumps({"text": line}) for line in TEXTS]
    (tmp_path / "text.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    if "model.path=FOLDER/lm" in SHORT[name]:
        causal_folder(tmp_path / "lm")
    if "model.path=FOLDER/vit" in SHORT[name]:
        images = DataInfo("image", (1, 28, 28), 5)
        write_untrained(tmp_path / "vit", images, patch=7, width=16, layers=1)
    given = [word.replace("FOLDER", str(tmp_path)) for word in SHORT[name]]
    for word in given:
        if word.startswith("data.path=") and not Path(word.partition("=")[2]).exists():
            pytest.skip(f"{word.partition('=')[2]} is not on this machine")
    words = [*given, "trainer.device=cpu", f"output.dir={tmp_path / 'run'}"]
    summary, folder = train(load_recipe(name, words))
    assert summary["status"] == "finished" and summary["steps"] == 3
    rung = "black box" if name == "movie-reviews-prompt" else "fold"
    assert summary["engine.rung"] == rung, summary["engine.reason"]
    written = json.loads((folder / "summary.json").read_text())
    assert written["eval.accuracy"] == summary["eval.accuracy"]
    scores = evaluate(folder)
    assert math.isclose(scores["loss"], summary["eval.loss"], rel_tol=1e-6)


def test_recipes_open_with_their_purpose_and_command() -> None:
    for name, text in shipped().items():
        comment = text.partition("\n\n")[0].splitlines()
        assert all(line.startswith("#") for line in comment), name
        assert any(line.startswith(f"#   fwdlearn train {name}") for line in comment), name
