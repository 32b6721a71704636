"""What tracking costs a run: wandb offline, and with a network that leads nowhere.

    python -m benchmarks.sink_cost [--steps N] [--rounds N] [RECIPE [KEY=VALUE]...]

Runs of the same recipe take turns: one without tracking, one with wandb offline, one with wandb
online at an address where nobody listens. Compared are the last two thirds of the steps, by the
clock and by the processor time of this process, which others on the machine disturb less; wandb
starts in the first third.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.run import train
from fwdlearn.sinks import Record
from fwdlearn.sinks.console import Console

WAYS = {
    "none": [],
    "offline": ["tracking={wandb: {mode: offline}}"],
    "blocked": ["tracking={wandb: {mode: online}}"],
}


class Watch(Console):
    """Notes the clock and the processor time of this process at every record; shows nothing."""

    def __init__(self) -> None:
        super().__init__("")
        self.noted: list[tuple[float, float]] = []

    def start(self, meta: Record) -> None:
        pass

    def log(self, record: Record) -> None:
        if "train.loss" in record:
            self.noted.append((time.perf_counter(), time.process_time()))

    def finish(self, summary: Record) -> None:
        pass


def measured(recipe: str, words: list[str]) -> tuple[float, float, bytes]:
    """Seconds by the clock and by the processor, from a third of the run on, and the weights."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        _, path = train(load_recipe(recipe, [*words, f"output.dir={folder}/run"]), watch)
        weights = (Path(path) / "model" / "model.safetensors").read_bytes()
    begun, ended = watch.noted[len(watch.noted) // 3], watch.noted[-1]
    return ended[0] - begun[0], ended[1] - begun[1], weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    asked = parser.parse_args()
    with socket.socket() as taken:
        # Bound and not listening.
        taken.bind(("127.0.0.1", 0))
        os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{taken.getsockname()[1]}"
        os.environ["WANDB_API_KEY"] = "0" * 40
        os.environ.pop("WANDB_MODE", None)
        words = [*asked.words, f"trainer.steps={asked.steps}", "trainer.evaluate_every=null"]
        found: dict[str, list[tuple[float, float, bytes]]] = {name: [] for name in WAYS}
        for _ in range(asked.rounds):
            for name, tracking in WAYS.items():
                found[name].append(measured(asked.recipe, [*words, *tracking]))
    plain = found["none"]
    for name, runs in found.items():
        clock = median(one[0] / base[0] for one, base in zip(runs, plain, strict=True))
        cpu = median(one[1] / base[1] for one, base in zip(runs, plain, strict=True))
        same = all(one[2] == plain[0][2] for one in runs)
        step = 1.5e3 * median(one[0] for one in runs) / asked.steps
        print(
            f"{name:8} {step:.2f} ms a step, by the "
            f"clock {clock - 1:+.1%}, by the processor {cpu - 1:+.1%}; the weights "
            f"{'are the same' if same else 'DIFFER'}"
        )


if __name__ == "__main__":
    main()
