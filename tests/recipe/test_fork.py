"""A run that begins where another is, with a recipe of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fwdlearn.cli import main
from fwdlearn.ledger.records import Ledger, same
from fwdlearn.recipe.weights import read_model
from tests.ledger.killing import ADAM, CASES, MOMENTUM, recipe

QUIET = ["--quiet", "output.snapshot_seconds=0"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _train(name: str, text: str, *words: str) -> int:
    Path("r.yaml").write_text(text)
    return main(["train", "r.yaml", f"output.dir={name}", *QUIET, *words])


def _equal(one: Path, other: Path) -> bool:
    a, b = read_model(one / "model"), read_model(other / "model")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Longer schedules are other schedules, so these have none but the last, which keeps its length.
@pytest.mark.parametrize(
    "text",
    [
        recipe("{name: RandomPerturbation}", MOMENTUM),
        recipe("{name: ForwardGradient, guess: momentum}", "{name: Adam, lr: 0.01}"),
        CASES["adaptive-momentum"],
        CASES["perturbation-frank-wolfe"],
        recipe("{name: RandomPerturbation}", ADAM),
    ],
)
def test_a_fork_is_the_longer_run(here: Path, text: str) -> None:
    assert _train("whole", text) == 0
    short = text if "schedule" in text else text.replace("steps: 30", "steps: 20")
    assert _train("short", short) == 0
    assert _train("fork", text, "--fork", "short", "--step", "17") == 0
    assert _equal(here / "whole", here / "fork")
    ledgers = [Ledger(here / name / "ledger.bin") for name in ("whole", "fork")]
    assert ledgers[1].steps == 30
    # A record says whether the rung stayed, which the first after a fork knows no better.
    assert all(
        torch.equal(one.coefficients, other.coefficients)
        if one.coefficients is not None
        else one.loss == other.loss
        for one, other in zip(*ledgers, strict=True)
    )
    begun = ledgers[1].header["parent"]
    parent = Ledger(here / "short" / "ledger.bin")
    assert (begun["run"], begun["step"], begun["ledger"]) == ("short", 17, parent.hash(17).hex())
    assert begun["changed"] == ([] if text == short else ["trainer.steps is 20 there and 30 here"])


def test_what_changes_is_as_the_new_recipe_says(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe("{name: RandomPerturbation}", MOMENTUM)
    assert _train("parent", text) == 0
    before = (here / "parent" / "ledger.bin").read_bytes()
    words = ["optimizer.lr=0.001", "estimator.sigma=0.01", "trainer.steps=40"]
    assert _train("parent", text, *words) == 2
    assert "with --fork parent to begin where it is" in capsys.readouterr().err
    assert _train("child", text, *words, "--fork", "parent") == 0
    child = Ledger(here / "child" / "ledger.bin")
    assert child.steps == 40 and child.header["parent"]["step"] == 30
    assert all(
        same(a, b) for a, b in zip(Ledger(here / "parent" / "ledger.bin"), child, strict=False)
    )
    assert (here / "parent" / "ledger.bin").read_bytes() == before
    # A fork is a run: it goes on, is replayed, verified and forked as one.
    assert main(["verify", "child", "--replay"]) == 0
    assert "parent.safetensors" in capsys.readouterr().out
    assert main(["replay", "child", "--step", "30", "--out", "at"]) == 0
    there = read_model(here / "parent" / "model")
    assert all(torch.equal(there[name], value) for name, value in read_model(here / "at").items())
    assert main(["replay", "child", "--step", "29", "--out", "x"]) == 2
    assert "steps before that are those of parent" in capsys.readouterr().err
    assert main(["apply", "-", "child/ledger.bin", "--out", "x"]) == 2
    assert _train("grandchild", text, "trainer.steps=50", "--fork", "child", "--step", "35") == 0
    assert Ledger(here / "grandchild" / "ledger.bin").header["parent"]["step"] == 35


@pytest.mark.parametrize("snapshots", [True, False])
def test_a_fork_that_was_stopped_goes_on(here: Path, snapshots: bool) -> None:
    text = CASES["adaptive-momentum"]
    assert _train("parent", text) == 0
    words = ["optimizer.lr=0.001", "trainer.steps=45", "--fork", "parent", "--step", "22"]
    assert _train("whole", text, *words) == 0
    assert _train("cut", text, *words) == 0
    path = here / "cut" / "ledger.bin"
    for step in (40, 22):
        with path.open("r+b") as file:
            file.truncate(Ledger(path).end_of(step))
        if not snapshots:
            for file_ in (here / "cut" / "snapshots").iterdir():
                file_.unlink()
        (here / "cut" / "summary.json").write_text('{"status": "running"}')
        # Neither the other run nor the option is needed any more.
        command = ["resume", "cut", "--quiet"] if step == 40 else ["train", "r.yaml", *words]
        extra = [] if step == 40 else ["output.dir=cut", *QUIET]
        assert main([*command, *extra]) == 0
        assert _equal(here / "whole", here / "cut")
        assert path.read_bytes() == (here / "whole" / "ledger.bin").read_bytes()


def test_what_cannot_carry_over_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = recipe("{name: RandomPerturbation}", MOMENTUM)
    assert _train("parent", text) == 0
    more = ["trainer.steps=40", "--fork", "parent"]
    for words, message in (
        (["model.hidden=[9]", *more], "layers.0.weight is torch.float32 [8, 64] there and"),
        (["--fork", "parent"], "30 steps (720 queries) have been taken"),
        ([*more, "--step", "31"], "--step must be from 0 to 30"),
        (["--step", "3"], "--step says after which step to --fork a run"),
        (["--fork", "nowhere"], "nowhere holds no run"),
    ):
        capsys.readouterr()
        assert _train("child", text, *words) in (2, 3)
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1, said
        assert not (here / "child" / "ledger.bin").exists()
    assert _train("child", text, *more) == 0
    assert _train("child", text, *more, "--step", "12") == 2
    assert "child holds a run that began with step 30 of parent" in capsys.readouterr().err


def test_states_of_what_has_changed_begin_anew(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r.yaml").write_text(recipe("{name: ForwardGradient, guess: momentum}", MOMENTUM))
    assert main(["train", "r.yaml", "output.dir=parent"]) == 0
    words = ["estimator.guess=null", "optimizer.name=Adam", "~optimizer.momentum"]
    words += ["trainer.steps=35", "--fork", "parent", "output.dir=child"]
    assert main(["train", "r.yaml", *words]) == 0
    said = capsys.readouterr().out
    assert "the state of the estimator begins anew" in said
    assert "the state of the optimizer begins anew" in said
    assert "the state of the allocator" not in said
