"""Killed at any moment and started again by the same command: nothing differs in a single bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.ledger.killing import CASES, kill_and_compare

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
QUICK = (
    "perturbation-adam",
    "adaptive-momentum",
    "spsa-momentum-bfloat16",
    "causal-every-momentum",
    "words-adam",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_few_kills(tmp_path: Path, name: str) -> None:
    kill_and_compare(CASES[name], tmp_path, kills=2, seed=0)


def test_signals_that_ask_to_stop(tmp_path: Path) -> None:
    asking = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    kill_and_compare(CASES["guess-adam"], tmp_path, kills=4, seed=0, signals=asking)


# A hundred starts take minutes, and `--kills 2000` hours.
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_kills(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    kills = -(-int(request.config.getoption("--kills")) // len(CASES))
    # Other moments where there are more of them.
    runs = kill_and_compare(CASES[name], tmp_path, kills, seed=kills)
    print(f"{name}: {kills} kills in {runs} runs, nothing differs")
