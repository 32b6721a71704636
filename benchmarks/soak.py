"""A long run of a tiny model: what grows, and what slows down.

    python -m benchmarks.soak [--steps N] [--minutes M] [KEY=VALUE]...

Memory is that of the whole process, from a tenth of the run on. Time is that of its processor, and
is compared with that of a few hundred passes of another such network, taken at every record: what
others on the machine do to caches and clocks, they do to both. At the end the weights are rebuilt
from the ledger and compared in every bit. Exits with 1 where memory has grown by 5 MB or more,
steps have become slower by a twentieth or more, a step has taken more than 64 bytes and 4 a
direction, or a bit differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.results import FOLDER, write
from fwdlearn.ledger.journal import LEDGER
from fwdlearn.ledger.records import Ledger
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.run import Interrupted, train
from fwdlearn.recipe.verify import verify
from fwdlearn.sinks import Record
from fwdlearn.sinks.console import Console

RECIPE = """\
model: {name: mlp, hidden: [4]}
data: {name: digits, test_fraction: 0.9}
estimator: {name: RandomPerturbation}
allocator: {name: Uniform, directions: 1, sharing: shared}
optimizer: {name: SGD, lr: 1e-3}
"""
_PARTS, _PASSES = 1000, 400


class Watch(Console):
    """Notes memory and time at every record.

    Args:
        seconds: after which the run is stopped.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__("soak")
        self.until = time.monotonic() + seconds
        self.noted: list[tuple[int, int, float, float]] = []
        self.other = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
        self.rows = torch.ones(4, 64)

    def log(self, record: Record) -> None:
        if "train.loss" in record:
            begun = time.process_time()
            with torch.inference_mode():
                for _ in range(_PASSES):
                    self.other(self.rows)
            ended = time.process_time()
            self.noted.append((record["step"], resident(), begun, ended))
            if time.monotonic() > self.until:
                raise Interrupted(15)


def resident() -> int:
    """Bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=24 * 60.0)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    every = max(1, asked.steps // _PARTS)
    size = f"trainer={{batch_size: 4, steps: {asked.steps}, log_every: {every}}}"
    watch = Watch(60 * asked.minutes)
    with tempfile.TemporaryDirectory() as folder:
        recipe, run = Path(folder) / "soak.yaml", Path(folder) / "run"
        recipe.write_text(RECIPE)
        try:
            train(load_recipe(str(recipe), [size, f"output.dir={run}", *asked.words]), watch)
        except Interrupted:
            print(f"stopped after {asked.minutes:g} minutes")
        ledger = Ledger(run / LEDGER)
        record = (ledger.end - ledger.end_of(0)) / ledger.steps
        coefficients = ledger.record(ledger.steps).coefficients
        assert coefficients is not None
        most = 64 + 4 * len(coefficients)
        steps, memory, begun, ended = zip(*watch.noted, strict=True)
        tenth = len(steps) // 10
        grown = (memory[-1] - memory[tenth]) / 1e6
        # Of a step, and of the passes before and after it.
        paces = [
            (begun[n + 1] - ended[n]) / (steps[n + 1] - steps[n]) for n in range(len(steps) - 1)
        ]
        passes = [
            (ended[n] - begun[n] + ended[n + 1] - begun[n + 1]) / 2 for n in range(len(steps) - 1)
        ]
        shares = [pace / each for pace, each in zip(paces, passes, strict=True)]
        fifth = max(1, len(paces) // 5)
        parts = slice(tenth, tenth + fifth), slice(-fifth, None)
        (first, last), (share, after) = (
            [median(values[part]) for part in parts] for values in (paces, shares)
        )
        print(
            f"{ledger.steps} steps; memory {grown:+.2f} MB; a step {1e3 * first:.3f} ms at first "
            f"and {1e3 * last:.3f} ms at last, beside other passes {after / share - 1:+.1%}; "
            f"{record:.0f} bytes a step",
            flush=True,
        )
        found = verify(run, rebuild=True)
    print(found[-1].says)
    results = {
        "steps": steps[-1],
        "grown_mb": grown,
        "step_ms_first": 1e3 * first,
        "step_ms_last": 1e3 * last,
        "slower_beside_passes": after / share - 1,
        "bytes_a_step": record,
        "rebuilt": found[-1].says,
    }
    write(FOLDER / "soak.json", results)
    sound = all(one.sound for one in found)
    bad = grown >= 5 or after / share >= 1.05 or record > most or not sound
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
