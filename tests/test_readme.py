"""The README: its table is fresh, its code runs, its commands work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fwdlearn.estimators as estimators
from fwdlearn.estimator import Estimator

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- table: `pytest --rewrite-golden` writes it -->\n", "<!-- end of table -->"
# Enough to run a command, not to learn.
SHORT = {
    "fwdlearn tune my.yaml": ["--seconds", "2"],
    "fwdlearn train quickstart trainer.steps=300 seed=1": ["trainer.steps=3"],
    "fwdlearn explain my.yaml": ["trainer.batch_size=8"],
    "fwdlearn compare quickstart estimators=SPSA": ["trainer.steps=2", "seeds=0"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)


def table() -> str:
    lines = ["| estimator | needs | perturbs | its mean is | queries |", "|---|---|---|---|---|"]
    for name in estimators.__all__:
        cls = getattr(estimators, name)
        assert issubclass(cls, Estimator)
        traits = cls().traits
        summary = (cls.__doc__ or "").partition("\n")[0].rstrip(".")
        means = {
            "gradient": "the gradient",
            "smoothed": "the gradient of the smoothed loss",
            "biased": "neither",
        }
        cost = f"{traits.queries_per_direction} a direction"
        if traits.queries_per_row:
            cost += f" + {traits.queries_per_row} a row"
        lines.append(
            f"| `{name}`: {summary[0].lower()}{summary[1:]} | {traits.needs.__name__} "
            f"| {traits.perturbs} | {means[traits.target]} | {cost} |"
        )
    return "\n".join(lines) + "\n"


def test_the_table_is_fresh(request: pytest.FixtureRequest) -> None:
    text = README.read_text("utf-8")
    head, _, rest = text.partition(START)
    written, _, tail = rest.partition(END)
    if request.config.getoption("--rewrite-golden"):
        README.write_text(head + START + table() + END + tail, "utf-8")
        return
    assert written == table(), "run pytest tests/test_readme.py --rewrite-golden"


def test_the_library_example_runs() -> None:
    code = blocks("python")[0].replace("steps=300", "steps=60")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert 0.2 < float(done.stdout) <= 1


def test_the_example_of_an_own_estimator_conforms(tmp_path: Path) -> None:
    (tmp_path / "mymodule.py").write_text(blocks("python")[1], "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "fwdlearn", "check", "mymodule:Central"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_work(tmp_path: Path) -> None:
    commands = blocks("sh")[2].splitlines()
    assert len(commands) == 10
    for line in commands:
        words = shlex.split(line, comments=True)
        command = " ".join(words)
        assert words[0] == "fwdlearn"
        done = subprocess.run(
            [sys.executable, "-m", "fwdlearn", *words[1:], *SHORT.get(command, [])],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout, command


def test_make_has_the_commands_that_the_first_block_names() -> None:
    targets = (README.parent / "Makefile").read_text("utf-8")
    for line in blocks("sh")[0].splitlines():
        tool, target = shlex.split(line, comments=True)
        assert tool == "make" and re.search(rf"^{target}:", targets, flags=re.MULTILINE)
