"""The commands about runs: resume, replay, verify, runs, diff."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fwdlearn.cli import main
from fwdlearn.ledger.records import Ledger
from fwdlearn.recipe.weights import read_model
from tests.ledger.killing import ADAM, CASES, recipe, start

WORDS = ["output.snapshot_seconds=0", "--quiet"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a recipe in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(CASES["perturbation-adam"])
    return tmp_path


def _cut(folder: Path, step: int) -> None:
    """Makes a finished run one that was stopped after a step."""
    end = Ledger(folder / "ledger.bin").end_of(step)
    with (folder / "ledger.bin").open("r+b") as file:
        file.truncate(end)
    (folder / "summary.json").write_text('{"status": "running"}')


@pytest.mark.parametrize("optimizer", [ADAM, "{name: SGD, lr: 0.1, momentum: 0.9}"])
def test_replay_gives_the_weights_of_any_step(
    here: Path, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    text = recipe("{name: RandomPerturbation}", optimizer)
    (here / "r.yaml").write_text(text)
    # The rate of the second case diverges, and replay must follow all the same.
    words = [*WORDS, "trainer.divergence=null"]
    assert main(["train", "r.yaml", "output.dir=whole", *words]) == 0
    for step in (1, 17, 30):
        assert main(["replay", "whole", "--step", str(step), "--out", f"at-{step}"]) == 0
    # What the run itself had after those steps; its length decides the course of the rate alone.
    if "schedule" not in optimizer:
        assert main(["train", "r.yaml", "output.dir=short", "trainer.steps=17", *words]) == 0
        wanted = read_model(here / "short" / "model")
        found = read_model(here / "at-17")
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    wanted, found = (read_model(here / name) for name in ("whole/model", "at-30"))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    capsys.readouterr()
    assert main(["replay", "whole", "--step", "31", "--out", "x"]) == 2
    assert "--step must be from 0 to 30" in capsys.readouterr().err
    assert main(["replay", "whole", "--out", "at-1"]) == 2
    assert "at-1 is there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["perturbation-adam", "guess-adam", "adaptive-momentum"])
def test_verify_rebuilds_what_was_saved(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (here / "r.yaml").write_text(CASES[name])
    assert main(["train", "r.yaml", "output.dir=run", *WORDS]) == 0
    capsys.readouterr()
    assert main(["verify", "run", "--replay"]) == 0
    shown = capsys.readouterr().out
    again = 30 if name == "guess-adam" else 0
    assert f"30 steps, {again} of them by forward passes; the weights are those" in shown


def test_verify_finds_what_is_damaged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "r.yaml", "output.dir=run", *WORDS]) == 0
    assert main(["verify", "run"]) == 0
    for file in ("ledger.bin", "model/model.safetensors"):
        path = here / "run" / file
        whole = path.read_bytes()
        path.write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
        capsys.readouterr()
        assert main(["verify", "run"]) == 5
        shown = capsys.readouterr().out
        assert "is damaged" in shown or "is not as it was written" in shown
        path.write_bytes(whole)
    (here / "run" / "resolved.yaml").write_text(CASES["slopes-sgd"])
    assert main(["verify", "run"]) == 5
    assert main(["verify", "nowhere"]) == 3


def test_resume_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "r.yaml", "output.dir=run", *WORDS]) == 0
    before = (here / "run" / "model" / "model.safetensors").read_bytes()
    text = (here / "run" / "recipe.yaml").read_text()
    _cut(here / "run", 12)
    assert main(["resume", "run"]) == 0
    assert "goes on at step 12: from " in capsys.readouterr().out
    assert (here / "run" / "model" / "model.safetensors").read_bytes() == before
    assert (here / "run" / "recipe.yaml").read_text() == text
    assert len(json.loads((here / "run" / "env.json").read_text())["continued"]) == 1
    assert main(["resume", "run"]) == 0
    assert "run has finished already, after 30 steps" in capsys.readouterr().out


def test_train_goes_on_in_the_last_folder_of_its_name(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "r.yaml", *WORDS]) == 0
    _cut(here / "runs" / "r", 12)
    assert main(["train", "r.yaml", "seed=9", *WORDS]) == 0
    assert main(["train", "r.yaml", *WORDS]) == 0
    assert capsys.readouterr().out.split() == ["runs/r", "runs/r-2", "runs/r-3"]
    _cut(here / "runs" / "r-3", 12)
    assert main(["train", "r.yaml", "output.snapshot_seconds=1"]) == 0
    shown = capsys.readouterr().out
    assert "goes on at step 12" in shown and shown.split()[-1] == "runs/r-3"


def test_another_recipe_is_refused_with_the_keys_that_differ(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "r.yaml", "output.dir=run", *WORDS]) == 0
    _cut(here / "run", 12)
    assert main(["train", "r.yaml", "output.dir=run", "optimizer.lr=0.5", "seed=4"]) == 2
    assert capsys.readouterr().err == (
        "command line: output.dir: run holds a run of another recipe: optimizer.lr is 0.01 there "
        "and 0.5 here; seed is 3 there and 4 here. Choose another output.dir, "
        "with --fork run to begin where it is, or output.overwrite=true to replace it.\n"
    )
    # What decides nothing may change.
    assert main(["train", "r.yaml", "output.dir=run", "--quiet"]) == 0


def test_a_run_whose_recipe_is_damaged_is_not_touched(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "r.yaml", *WORDS]) == 0
    _cut(here / "runs" / "r", 12)
    (here / "runs" / "r" / "resolved.yaml").write_text("]")
    capsys.readouterr()
    assert main(["train", "r.yaml", "output.dir=runs/r"]) == 2
    assert "resolved.yaml is no recipe any more" in capsys.readouterr().err
    assert main(["train", "r.yaml", *WORDS]) == 0
    assert capsys.readouterr().out == "runs/r-2\n"
    assert Ledger(here / "runs" / "r" / "ledger.bin").steps == 12


def test_two_processes_and_one_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fcntl")
    words = [str(here / "r.yaml"), f"output.dir={here}/run", "trainer.steps=100000", "--quiet"]
    first = start(words, here / "log")
    while not (here / "run" / "ledger.bin").exists():
        assert first.is_alive(), (here / "log").read_text()
    assert main(["train", *words]) == 2
    assert "another run is writing to" in capsys.readouterr().err
    # The lock goes with the process, whatever its end.
    first.kill()
    first.join()
    _cut(here / "run", 1)
    assert main(["verify", "run"]) == 0


def test_runs_and_diff(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        assert main(["train", "r.yaml", f"seed={seed}", f"output.dir=runs/{seed}", *WORDS]) == 0
    assert main(["train", "r.yaml", "seed=0", "output.dir=runs/2", *WORDS]) == 0
    capsys.readouterr()
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["run", "runs/0", "runs/1", "runs/2"]
    assert "finished" in shown[1] and "RandomPerturbation" in shown[1]
    assert main(["runs", "--by", "eval.loss", "--json"]) == 0
    losses = [run["eval.loss"] for run in json.loads(capsys.readouterr().out)]
    assert losses == sorted(losses)
    assert main(["runs", "--by", "nonsense"]) == 2
    assert main(["runs", "nowhere"]) == 3
    assert main(["diff", "runs/0", "runs/1"]) == 1
    shown = capsys.readouterr().out
    assert "seed is 0 there and 1 here" in shown and "other weights from the start" in shown
    assert main(["diff", "runs/0", "runs/2"]) == 0
    assert "none in 30 steps" in capsys.readouterr().out
    assert main(["diff", "runs/0", "runs/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == []


@pytest.mark.parametrize("name", ["perturbation-adam", "adaptive-momentum", "slopes-sgd"])
def test_a_ledger_and_the_first_weights_are_the_trained_model(here: Path, name: str) -> None:
    (here / "r.yaml").write_text(CASES[name])
    assert main(["train", "r.yaml", "output.dir=run", *WORDS]) == 0
    assert main(["replay", "run", "--step", "0", "--out", "base"]) == 0
    wanted = read_model(here / "run" / "model")
    for base, out in (("-", "a"), ("base", "b")):
        assert main(["apply", base, "run/ledger.bin", "--out", out]) == 0
        found = read_model(here / out)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_what_cannot_be_applied(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "r.yaml", "output.dir=run", *WORDS]) == 0
    capsys.readouterr()
    assert main(["apply", "run/model", "run/ledger.bin", "--out", "x"]) == 2
    assert "run/ledger.bin was made on another model: " in capsys.readouterr().err
    for name, message in (
        ("activity-adam", "the record of step 1 holds no coefficients"),
        ("spsa-momentum-bfloat16", "its recipe names code, 'tests.ledger.parts:short'"),
    ):
        (here / "r.yaml").write_text(CASES[name])
        assert main(["train", "r.yaml", f"output.dir={name}", *WORDS]) == 0
        assert main(["apply", "-", f"{name}/ledger.bin", "--out", "x"]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", "activity-adam", "--format", "ledger", "--out", "x"]) == 2
    assert "the record of step 1 holds no coefficients" in capsys.readouterr().err
    assert main(["apply", "-", "nowhere.bin", "--out", "x"]) == 3
    assert not (here / "x").exists()


def test_export(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "r.yaml", "output.dir=run", *WORDS]) == 0
    wanted = (here / "run" / "model" / "model.safetensors").read_bytes()
    whole = (here / "run" / "ledger.bin").read_bytes()
    assert main(["export", "run", "--out", "a.safetensors"]) == 0
    _cut(here / "run", 30)
    (here / "run" / "ledger.bin").write_bytes(whole + b"torn")
    assert main(["export", "run", "--out", "b.safetensors"]) == 0
    assert main(["export", "run", "--format", "ledger", "--out", "l.bin"]) == 0
    assert (here / "a.safetensors").read_bytes() == wanted == (here / "b.safetensors").read_bytes()
    assert (here / "l.bin").read_bytes() == whole
    assert main(["apply", "-", "l.bin", "--out", "applied"]) == 0
    assert (here / "applied" / "model.safetensors").read_bytes() == wanted
    capsys.readouterr()
    for words, message in (
        (["--format", "transformers", "--out", "x"], "trains no model of transformers"),
        (["--format", "gguf", "--out", "x"], "must be one of transformers, peft, safetensors"),
        (["--format", "peft", "--out", "x"], "trains no adapters; model.lora=RANK gives"),
        (["--out", "l.bin"], "l.bin is there already"),
    ):
        assert main(["export", "run", *words]) == 2
        assert message in capsys.readouterr().err
