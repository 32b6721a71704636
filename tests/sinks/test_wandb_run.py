"""A run whose tracking cannot reach anyone is the same run, and nobody is asked anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """\
model: {name: mlp, hidden: [8]}
data: {name: digits, test_fraction: 0.9}
estimator: {name: RandomPerturbation}
allocator: {name: Uniform, directions: 2}
optimizer: {name: Adam, lr: 0.01}
trainer: {batch_size: 8, steps: 40, log_every: 5}
"""
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")


def _start(folder: Path, name: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    (folder / "r.yaml").write_text(RECIPE)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    command = [sys.executable, "-m", "fwdlearn", "train", "r.yaml", f"output.dir={name}", "--quiet"]
    return subprocess.Popen(
        [*command, *words],
        cwd=folder,
        env={**kept, "HOME": str(folder), "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _below(process: int) -> list[tuple[int, str]]:
    """Numbers and arguments of the processes that come of one."""
    shown = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in shown.stdout.splitlines()]
    found, parents = [], {str(process)}
    # A process is listed after the one that it comes of, but for numbers that begin anew.
    for number, parent, arguments in rows:
        if parent in parents:
            parents.add(number)
            found.append((int(number), arguments))
    return found


def _weights(folder: Path, name: str) -> bytes:
    return (folder / name / "model" / "model.safetensors").read_bytes()


# Its own process, and wandb's, take seconds to start.
@pytest.mark.slow
def test_the_same_weights_whatever_becomes_of_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    plain = _start(tmp_path, "plain")
    assert plain.wait(120) == 0
    # An address that nobody listens at.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        online = "tracking={wandb: {mode: online}}"
        cases = {
            "blocked": (online, {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": nowhere}),
            "invalid-key": (online, {"WANDB_API_KEY": "no key", "WANDB_BASE_URL": nowhere}),
            "no-key": (online, {}),
            "offline": ("tracking={wandb: true}", {}),
        }
        for name, (tracking, environment) in cases.items():
            begun = time.monotonic()
            run = _start(tmp_path, name, tracking, **environment)
            out, error = run.communicate(timeout=180)
            assert run.returncode == 0, error
            assert "Traceback" not in error and "prompt" not in error.lower(), error
            assert out.strip() == name
            assert _weights(tmp_path, name) == _weights(tmp_path, "plain"), name
            assert time.monotonic() - begun < 120
    summary = json.loads((tmp_path / "blocked" / "summary.json").read_text())
    assert summary["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["wandb-core", "fwdlearn.recipe.tracking"])
def test_the_process_of_wandb_is_killed(tmp_path: Path, which: str) -> None:
    pytest.importorskip("wandb")
    assert _start(tmp_path, "plain", "trainer.steps=1500").wait(300) == 0
    run = _start(tmp_path, "killed", "trainer.steps=1500", "tracking={wandb: true}")
    killed = 0
    while run.poll() is None:
        for number, arguments in _below(run.pid):
            # Once it has come as far as that.
            if which in arguments and not killed and list(tmp_path.glob("killed/wandb/*/*.wandb")):
                os.kill(number, signal.SIGKILL)
                killed += 1
        time.sleep(0.1)
    _, error = run.communicate(timeout=60)
    assert killed and run.returncode == 0, error
    if which != "wandb-core":
        assert "wandb its process ended with status -9; the run goes on without it" in error
    assert _weights(tmp_path, "killed") == _weights(tmp_path, "plain")
