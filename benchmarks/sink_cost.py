"""What tracking costs a run: wandb offline, and with a network that leads nowhere.

    python -m benchmarks.sink_cost [--steps N] [--rounds N] [RECIPE [KEY=VALUE]...]

In a round, runs of the same recipe take turns of some seconds, each in a process of its own that is
stopped while it is not its turn: two without tracking, one with wandb offline, one with wandb
online at an address where nobody listens. Compared are the last two thirds of the turns, by the
clock and by the processor time of the run's process; wandb starts in the first third, and gives
that address up after half a minute. What the second run without tracking differs by is what runs
differ by anyhow, by where in memory things lie. What wandb's own processes do, they do on another
core here. More records (`trainer.log_every=5`) show what one costs. Beside that stands the share of
its time that the run gives to sinks, their beginning and end among it, and waiting for the
interpreter apart: the most of all rounds.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
from math import pi, sqrt
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks.results import FOLDER, write
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.run import train
from fwdlearn.sinks import Record
from fwdlearn.sinks.background import Background
from fwdlearn.sinks.console import Console

WAYS = {
    "none": [],
    "again": [],
    "offline": ["tracking={wandb: {mode: offline}}"],
    "blocked": ["tracking={wandb: {mode: online}}"],
}


_TURN = 500


class Turns(Console):
    """Waits at every record until it is its turn, and tells what the last one took.

    Other sinks get the record after that, so what they do about it falls into the turn.
    """

    def __init__(self, pipe: Connection) -> None:
        super().__init__("")
        self.pipe = pipe
        self.begun = 0.0, 0.0

    def start(self, meta: Record) -> None:
        pass

    def log(self, record: Record) -> None:
        if "train.loss" not in record or record["step"] % _TURN:
            return
        now = time.perf_counter(), time.process_time()
        self.pipe.send((now[0] - self.begun[0], now[1] - self.begun[1]))
        self.pipe.recv()
        self.begun = time.perf_counter(), time.process_time()

    def finish(self, summary: Record) -> None:
        self.pipe.send(None)


def run(recipe: str, words: list[str], pipe: Connection) -> None:
    """In a process: trains, and tells its weights at last, and what it spent on sinks itself."""
    spent = [0.0]

    def timed(method: Any, clock: Any) -> Any:
        def call(*args: Any) -> None:
            begun = clock()
            method(*args)
            spent.append(clock() - begun)

        return call

    log, work = timed(Background.log, time.perf_counter), timed(Background._work, time.thread_time)
    sys.stderr = open(os.devnull, "w")
    begun = time.process_time()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.multiple(Background, log=log, _work=work),
    ):
        _, path = train(load_recipe(recipe, [*words, f"output.dir={folder}/run"]), Turns(pipe))
        weights = (Path(path) / "model" / "model.safetensors").read_bytes()
    pipe.send((weights, sum(spent) / (time.process_time() - begun)))


class Round:
    """Runs that take turns.

    Attributes:
        turns: of each way, seconds by the clock and by the processor.
    """

    def __init__(self, recipe: str, words: list[str], order: list[str]) -> None:
        context = get_context("spawn")
        self.turns: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
        self._runs = {}
        for name in order:
            pipe, other = context.Pipe()
            process = context.Process(target=run, args=(recipe, [*words, *WAYS[name]], other))
            process.start()
            pipe.recv()
            os.kill(process.pid, signal.SIGSTOP)
            self._runs[name] = process, pipe
        left = list(order)
        while left:
            for name in list(left):
                process, pipe = self._runs[name]
                os.kill(process.pid, signal.SIGCONT)
                pipe.send("go")
                turn = pipe.recv()
                if turn is None:
                    left.remove(name)
                    continue
                os.kill(process.pid, signal.SIGSTOP)
                self.turns[name].append(turn)

    def ends(self) -> dict[str, tuple[bytes, float]]:
        """What each way tells when it has ended."""
        found = {name: pipe.recv() for name, (_, pipe) in self._runs.items()}
        for process, _ in self._runs.values():
            process.join()
        return found

    def ratio(self, name: str, part: int) -> float:
        """Of the turns of a way to those without tracking beside them, all together."""
        begin = len(self.turns[name]) // 3
        mine, plain = (sum(turn[part] for turn in self.turns[n][begin:]) for n in (name, "none"))
        return mine / plain


def compared(ratios: list[float]) -> tuple[float, float]:
    """The median less one, and what it may be off by (two deviations, from their spread)."""
    middle = median(ratios)
    spread = 1.4826 * median(abs(ratio - middle) for ratio in ratios)
    return middle - 1, 2 * spread * sqrt(pi / 2 / len(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    asked = parser.parse_args()
    words = [*asked.words, f"trainer.steps={asked.steps}", "trainer.evaluate_every=null"]
    with socket.socket() as nobody:
        # Bound and not listening.
        nobody.bind(("127.0.0.1", 0))
        os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        os.environ["WANDB_API_KEY"] = "0" * 40
        os.environ.pop("WANDB_MODE", None)
        rounds = []
        for number in range(asked.rounds):
            first = number % len(WAYS)
            order = [*WAYS][first:] + [*WAYS][:first]
            rounds.append(Round(asked.recipe, words, order))
        ends = [one.ends() for one in rounds]
    results = []
    for name in WAYS:
        turns = [turn[0] for one in rounds for turn in one.turns[name]]
        same = all(one[name][0] == ends[0]["none"][0] for one in ends)
        own = max(one[name][1] for one in ends)
        entry: dict[str, Any] = {
            "way": name,
            "turn_ms": 1e3 * median(turns),
            "own_share": own,
            "same_weights": same,
        }
        line = f"{name:8} {entry['turn_ms']:.1f} ms a turn, {own:.3%} of its time for sinks"
        if name != "none":
            for part, by in enumerate(("clock", "processor")):
                entry[by], off = compared([one.ratio(name, part) for one in rounds])
                entry[f"{by}_off_by"] = off
                line += f", by the {by} {entry[by]:+.2%} (within {off:.2%})"
        results.append(entry)
        print(f"{line}; the weights {'are the same' if same else 'DIFFER'}")
    about = {"recipe": asked.recipe, "words": words, "rounds": asked.rounds, "ways": results}
    write(FOLDER / "sink_cost.json", about)


if __name__ == "__main__":
    main()
