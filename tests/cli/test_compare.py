"""`fwdlearn compare`: equal budgets and starts, results that outlive failures, every refusal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fwdlearn.cli import main
from fwdlearn.compare.methods import plan
from fwdlearn.compare.report import as_text, notes, rows
from fwdlearn.compare.results import summarise
from fwdlearn.compare.runs import runs
from fwdlearn.errors import MissingError, RecipeError
from fwdlearn.recipe.build import assemble
from fwdlearn.recipe.load import load_recipe

TINY = """\
model: {name: mlp, hidden: [8]}
data: {name: digits}
estimator: {name: RandomPerturbation, sigma: 0.01}
allocator: {name: Uniform, directions: 2}
optimizer: {name: Adam, lr: 1e-2, schedule: {name: CosineAnnealingLR}}
trainer: {batch_size: 16, steps: 8, evaluate_every: 4, device: cpu}
"""
# The second diverges; the third has a cost a step that does not divide the budget.
METHODS = (
    "RandomPerturbation,{as: wild, with: {optimizer: {name: SGD, lr: 1e30}}},"
    "{name: SPSA, with: {allocator.directions: 3}}"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with tiny.yaml in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY, "utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, str]]:
    """One comparison: its folder, exit status and output."""
    folder = tmp_path_factory.mktemp("compared")
    before = Path.cwd()
    os.chdir(folder)
    Path("tiny.yaml").write_text(TINY, "utf-8")
    words = ["compare", "tiny.yaml", f"estimators={METHODS}", "seeds=0,1", "output.dir=out"]
    words += ["--jobs", "2"]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("typer.echo", lambda text, err=False: lines.append(text))
        code = main(words)
    yield folder / "out", code, "\n".join(lines)
    os.chdir(before)


def _results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text("utf-8"))
    return found


def test_budgets_are_equal_and_every_run_ends_with_its_own(
    compared: tuple[Path, int, str],
) -> None:
    results = _results(compared[0])
    assert results["queries"] == 8 * 16 * 3
    methods = {method["label"]: method for method in results["methods"]}
    assert {"fwdlearn", "python", "packages", "git_commit"} <= results["environment"].keys()
    assert list(methods) == ["RandomPerturbation", "wild", "SPSA", "backprop"]
    assert {label: method["queries_per_step"] for label, method in methods.items()} == {
        "RandomPerturbation": 48,
        "wild": 48,
        "SPSA": 96,
        "backprop": 48,
    }
    for label, method in methods.items():
        if label == "wild":
            continue
        assert len(method["runs"]) == results["runs_per_method"] == 2
        for run in method["runs"]:
            assert run["queries"] == run["steps"] * method["queries_per_step"]
            left = results["queries"] - run["queries"]
            assert 0 <= left < method["queries_per_step"]
            # As often evaluated as the recipe's own, the last time at the end.
            assert [point["queries"] for point in run["curve"]] == [192, 384]
            assert run["curve"][0]["seconds"] < run["curve"][1]["seconds"] == run["seconds"]
            assert run["peak"] > run["start"] > 0
    assert methods["backprop"]["baseline"] and not methods["SPSA"]["baseline"]


def test_weights_and_batches_are_the_same(compared: tuple[Path, int, str]) -> None:
    folders = [compared[0] / "runs" / f"{name}-seed-1" for name in ("SPSA", "backprop")]
    made = [assemble(load_recipe(str(folder / "resolved.yaml"))) for folder in folders]
    one, other = (assembly.built.module.state_dict() for assembly in made)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for step in (0, 3):
        first, second = (assembly.trainer.batch(step) for assembly in made)
        assert torch.equal(first.args[0], second.args[0])
        assert torch.equal(first.targets, second.targets)
    assert made[0].trainer.budget == made[1].trainer.budget == 384
    another = assemble(load_recipe(str(folders[0] / "resolved.yaml"), ["seed=0"]))
    weights = another.built.module.state_dict()
    assert not all(torch.equal(weights[name], one[name]) for name in one)


def test_a_method_that_fails_costs_no_other_its_results(compared: tuple[Path, int, str]) -> None:
    folder, code, shown = compared
    assert code == 4
    wild = _results(folder)["methods"][1]
    assert wild["runs"] == [] and wild["lr"] is None
    assert [failure["seed"] for failure in wild["failures"]] == [0, 1]
    assert wild["failures"][0]["exit_code"] == 4
    assert "finite" in wild["failures"][0]["reason"]
    assert "wild failed (seed 0): " in shown
    assert "[8/8]" in shown


def test_the_report_says_what_is_compared(compared: tuple[Path, int, str]) -> None:
    folder, _, shown = compared
    text = (folder / "compare.md").read_text("utf-8")
    for words in (
        "2 runs of each method (2 seeds), each with a budget of 384 queries",
        "backprop is no forward-only method: a row of a step counts 3 queries",
        "mean and standard deviation over seeds",
    ):
        assert words in text and words in shown
    assert text.startswith("# tiny: accuracy at equal queries\n\n| method | lr | accuracy |")
    assert {entry.name for entry in folder.iterdir()} - {"compare.png"} == {
        "compare.json",
        "compare.md",
        "recipe.yaml",
        "recipe-RandomPerturbation.yaml",
        "recipe-SPSA.yaml",
        "recipe-backprop.yaml",
        "recipe-wild.yaml",
        "runs",
    }
    assert load_recipe(str(folder / "recipe-SPSA.yaml")).trainer.queries == 384


def test_the_plot_is_drawn(compared: tuple[Path, int, str]) -> None:
    pytest.importorskip("matplotlib")
    assert (compared[0] / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_goes_on_where_it_stopped(
    compared: tuple[Path, int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compared[0]
    kept = (folder / "runs" / "SPSA-seed-0" / "summary.json").read_bytes()
    summary = folder / "runs" / "backprop-seed-1" / "summary.json"
    before = json.loads(summary.read_text())
    summary.write_text(json.dumps({"status": "interrupted"}))
    words = ["compare", "tiny.yaml", f"estimators={METHODS}", "seeds=0,1", f"output.dir={folder}"]
    words[2] = words[2].replace(",{as: wild, with: {optimizer: {name: SGD, lr: 1e30}}}", "")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "5 of 6 runs are there already" in shown
    assert "[6/6]  backprop  seed 1  accuracy " in shown
    assert (folder / "runs" / "SPSA-seed-0" / "summary.json").read_bytes() == kept
    again = json.loads(summary.read_text())
    assert again["eval.loss"] == pytest.approx(before["eval.loss"], rel=1e-5)

    assert main([*words, "optimizer.lr=0.5"]) == 2
    error = capsys.readouterr().err
    assert "RandomPerturbation-seed-0 holds a finished run of other settings; choose anoth" in error


def test_without_matplotlib_there_is_everything_else(
    compared: tuple[Path, int, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["compare", "tiny.yaml", "seeds=0", "backprop=false", f"output.dir={compared[0]}"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("no plot: matplotlib is not installed; pip install")
    assert shown.out.splitlines()[-1] == str(compared[0])
    assert "compare.png" not in (compared[0] / "compare.md").read_text("utf-8")


def test_the_best_rate_is_shown_and_edges_are_named(here: Path) -> None:
    comparison = plan("tiny.yaml", ["seeds=0,1", "lrs=0.01,0.1,1", "backprop=false"])
    assert comparison.lrs == (0.01, 0.1, 1.0) and comparison.runs_per_method == 6
    every = runs(comparison, here / "out")
    finals = {0.01: (0.2, 0.3), 0.1: (0.4, 0.6), 1.0: (0.9, None)}
    for run in every:
        assert run.lr is not None
        final = finals[run.lr][run.seed]
        if final is not None:
            run.folder.mkdir(parents=True)
            _finish(run.folder, final)
    results = summarise(comparison, every, {})
    # One seed of the best rate is missing, so that rate does not count.
    assert results.methods[0].lr == 0.1
    assert rows(results)[1][:4] == (
        "RandomPerturbation",
        "0.1",
        "50.00 % ± 14.14 %",
        "40.00 %, 60.00 %",
    )
    said = "\n".join(notes(results))
    assert "run at the learning rates 0.01, 0.1, 1; shown is its best" in said
    assert "did best at" not in said
    _finish(every[-1].folder, 0.8)
    results = summarise(comparison, every, {})
    assert "RandomPerturbation did best at the largest rate" in "\n".join(notes(results))


def test_columns_line_up(here: Path) -> None:
    comparison = plan("tiny.yaml", ["estimators=SPSA,RandomPerturbation"])
    lines = as_text(rows(summarise(comparison, (), {})))
    assert lines[1].startswith("SPSA                ") and lines[1].endswith("failed")


def _finish(folder: Path, final: float) -> None:
    folder.mkdir(exist_ok=True)
    record = {"queries": 10, "queries_per_second": 5.0}
    evaluation = {"queries": 10, "eval.loss": 1.0, "eval.accuracy": final}
    lines = [json.dumps(line) for line in (record, evaluation)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = {"status": "finished", "steps": 1, "queries": 10, "eval.accuracy": final}
    summary |= {"memory.peak_bytes": 3 * 2**20, "memory.start_bytes": 2**20}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_methods_start_from_the_right_settings(here: Path) -> None:
    words = [
        "estimators=RandomPerturbation,{sigma: 0.5},{name: SPSA, as: two-sided},"
        "{name: fwdlearn.estimators:RandomPerturbation, as: fresh}",
        "trainer.queries=4800",
        "trainer.evaluate_every=20",
    ]
    comparison = plan("tiny.yaml", words)
    labels = [method.label for method in comparison.methods]
    assert labels == [
        "RandomPerturbation",
        "RandomPerturbation(sigma=0.5)",
        "two-sided",
        "fresh",
        "backprop",
    ]
    # The recipe's own keeps its settings; any other starts from its defaults.
    sigmas = [m.recipe.components["estimator"].settings.get("sigma") for m in comparison.methods]
    assert sigmas == [0.01, 0.5, 1e-3, 1e-3, None]
    assert comparison.queries == 4800
    assert {method.recipe.trainer.queries for method in comparison.methods} == {4800}
    assert {method.recipe.trainer.steps for method in comparison.methods} == {None}
    # 48 queries a step, but 64 for SPSA: evaluated at the same numbers of queries.
    assert [method.steps for method in comparison.methods] == [100, 100, 75, 100, 100]
    every = [method.recipe.trainer.evaluate_every for method in comparison.methods]
    assert every == [20, 20, 15, 20, 20]


def test_a_recipe_can_hold_its_comparison(here: Path) -> None:
    section = "compare: {estimators: [SPSA], seeds: [3], lrs: [0.1], backprop: false}\n"
    (here / "tiny.yaml").write_text(TINY + section, "utf-8")
    comparison = plan("tiny.yaml")
    assert [method.label for method in comparison.methods] == ["SPSA"]
    assert [(run.lr, run.seed) for run in runs(comparison, here)] == [(0.1, 3)]
    assert plan("tiny.yaml", ["~lrs", "seeds=1,2"]).runs_per_method == 2
    assert "compare" in load_recipe("tiny.yaml").resolved()
    assert "compare" not in comparison.methods[0].recipe.resolved()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["estimators=SPSAA"], "SPSAA: command line: estimator.name: unknown estimator 'SPSAA'; "),
        (
            ["estimators={name: SPSA, sigmma: 1}"],
            "SPSA: command line: estimator.sigmma: unknown argument; did you mean 'sigma'?",
        ),
        (
            ["estimators={name: SPSA, sigma: -1}"],
            "SPSA: command line: estimator.sigma: SPSA(sigma=...) must be positive, got -1.",
        ),
        (
            ["estimators=SPSA,3"],
            "command line: compare.estimators[1]: must be a name, or `name:` and arguments, got 3",
        ),
        (
            ["estimators={name: 3}"],
            "command line: compare.estimators[0]: `name` must be text, got 3",
        ),
        (
            ["estimators={as: [x]}"],
            "command line: compare.estimators[0]: `as` must be text, what tables call it, got [",
        ),
        (
            ["estimators={with: 3}"],
            "command line: compare.estimators[0]: `with` must be settings of the recipe, such as",
        ),
        (
            ["estimators={with: {seed: 3}}"],
            "command line: compare.estimators[0]: `with` cannot change seed: methods are compared",
        ),
        (
            ["estimators={with: {trainer.steps: 3}}"],
            "command line: compare.estimators[0]: `with` cannot change trainer.steps: methods",
        ),
        (
            ["estimators={with: {trainer.stpes: 3}}", "backprop=false"],
            "RandomPerturbation: command line: trainer.stpes: unknown key; did you mean 'steps'?",
        ),
        (["estimators="], "command line: compare.estimators: must hold at least one"),
        (["estimators=SPSA,SPSA"], 'command line: compare.estimators: has {"name": "SPSA"} twice'),
        (
            ["estimators={name: SPSA, as: a},{as: A}"],
            "compare.estimators: two are called 'a'; tell them apart with `as: NAME`",
        ),
        (["seeds=0,x"], "command line: compare.seeds[1]: must be an integer, got 'x'"),
        (["seeds=0,0"], "command line: compare.seeds: has 0 twice; keep one"),
        (["lrs=0"], "command line: compare.lrs[0]: must be greater than 0, got 0"),
        (["lrs=x"], "command line: compare.lrs[0]: must be a number, got 'x'"),
        (["backprop=2"], "command line: compare.backprop: must be true or false, got 2"),
        (["compare.sedes=0"], "command line: compare.sedes: unknown key; did you mean 'seeds'?"),
        (
            ["trainer.queries=47"],
            "RandomPerturbation: a step takes 48 queries, and the budget is 47; raise trainer.q",
        ),
        (["output.dir=full"], "command line: output.dir: full is not empty and holds no comparis"),
    ],
)
def test_errors_come_before_any_run(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (here / "full").mkdir()
    (here / "full" / "letter").write_text("dear", "utf-8")
    assert main(["compare", "tiny.yaml", *words]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (here / "runs").exists()
    assert (here / "full" / "letter").read_text("utf-8") == "dear"


def test_all_problems_of_all_methods_are_told(here: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan("tiny.yaml", ["estimators=SPSAA,{name: SPSA, sigmma: 1, lawx: 2}"])
    assert [line.partition(":")[0] for line in caught.value.problems] == ["SPSAA", "SPSA", "SPSA"]
    with pytest.raises(MissingError, match="X: command line: estimator.name: nosuchpackage:X: no"):
        plan("tiny.yaml", ["estimators=nosuchpackage:X"])


def test_a_signal_stops_what_is_under_way(here: Path) -> None:
    words = ["compare", "tiny.yaml", "trainer.steps=1000000", "output.dir=x", "seeds=0"]
    running = subprocess.Popen(
        [sys.executable, "-m", "fwdlearn", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    run = here / "x" / "runs" / "RandomPerturbation-seed-0" / "metrics.jsonl"
    until = time.monotonic() + 90
    while not run.exists() and time.monotonic() < until:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM, error
    assert "Traceback" not in error
    assert json.loads((run.parent / "summary.json").read_text())["status"] == "interrupted"
    assert _results(here / "x")["methods"][0]["runs"] == []
