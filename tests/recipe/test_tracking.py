"""Sinks in processes of their own: what reaches them, and that nothing of them reaches the run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fwdlearn.recipe.component import bind
from fwdlearn.recipe.tracking import Apart
from fwdlearn.sinks.background import Background

NAME = "tests.recipe.sinks:Notes"
RECORDS = [{"step": 1, "train.loss": torch.tensor(0.5)}, {"step": 2, "train.loss": math.inf}]


def made(folder: Path, warnings: list[str], late: float = 30.0, **settings: str) -> Background:
    component, problems = bind("sink", ("tracking", NAME), NAME, settings)
    assert component is not None, problems
    sink = Apart(component, folder, {"seed": 3}, warnings.append, late)
    return Background(sink, "notes", warnings.append, patience=10.0)


def run(folder: Path, **settings: str) -> list[str]:
    """Of records that are handed over one by one, the warnings."""
    warnings: list[str] = []
    sink = made(folder, warnings, **settings)
    sink.start({"steps": 2})
    for record in RECORDS:
        sink.log(record)
    sink.finish({"status": "finished"})
    return warnings


def notes(folder: Path) -> list[list[Any]]:
    path = folder / "notes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_everything_arrives_elsewhere(tmp_path: Path) -> None:
    assert run(tmp_path) == []
    methods, records, processes = zip(*notes(tmp_path), strict=True)
    assert methods == ("start", "log", "log", "finish")
    assert records[0] == {"steps": 2} and records[3] == {"status": "finished"}
    assert records[1:3] == ({"step": 1, "train.loss": 0.5}, {"step": 2, "train.loss": math.inf})
    assert len(set(processes)) == 1 and processes[0] != os.getpid()


def test_what_it_is_given_and_says(tmp_path: Path) -> None:
    (said,) = run(tmp_path, at="log", how="speaks")[:1]
    assert json.loads(said) == {"seed": 3, "process": os.getpid(), "read": ""}


@pytest.mark.parametrize("at", ["start", "log", "finish"])
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("fails", "failed: RuntimeError: the server says no"),
        ("exits", "its process ended with status 3"),
    ],
)
def test_what_goes_wrong_there_is_one_warning(tmp_path: Path, at: str, how: str, why: str) -> None:
    assert run(tmp_path, at=at, how=how) == [
        f"notes {why}; the run goes on without it (metrics.jsonl has all)"
    ]


def test_a_sink_that_is_not_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    (warning,) = run(tmp_path)
    assert warning.startswith("notes failed: FileNotFoundError: ")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("hangs", [False, True])
def test_it_ends_with_a_run_that_is_killed(tmp_path: Path, hangs: bool) -> None:
    how = "late=0.5, at='start', how='hangs'" if hangs else ""
    code = (
        "import pathlib, sys, time\n"
        "from tests.recipe.test_tracking import made\n"
        f"sink = made(pathlib.Path(sys.argv[1]), [], {how})\n"
        "sink.start({})\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2]
    )
    _wait(lambda: len(notes(tmp_path)) == 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    number = notes(tmp_path)[0][2]
    _wait(lambda: not Path(f"/proc/{number}").exists())
    assert [one[:2] for one in notes(tmp_path)[1:]] == (
        [] if hangs else [["finish", {"status": "killed"}]]
    )


def _wait(until: Any) -> None:
    end = time.monotonic() + 20
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)
