"""What the record of a run costs: the share of a step, and bytes.

    python -m benchmarks.ledger_cost [--steps N] [RECIPE [KEY=VALUE]...]

Trains by a recipe in a folder of its own and times every call that appends a record, waiting for
the disk included, beside everything else that a step does. Snapshots are taken as a run takes them
and timed apart. `fewest` and `most` are of rounds of the same run, interleaved with none.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import FOLDER, write
from fwdlearn.ledger.journal import LEDGER, RunJournal
from fwdlearn.ledger.records import Ledger
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.run import train

WORDS = ["estimator={name: RandomPerturbation}", "allocator={name: Uniform, directions: 8}"]


def measured(recipe: str, words: list[str]) -> dict[str, float]:
    """Of one run: seconds of all steps, of appending and of snapshots, steps and bytes."""
    spent = {"append": 0.0, "snapshot": 0.0}

    def timed(name: str, call: Any) -> Any:
        def run(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args)
            finally:
                spent[name] += time.perf_counter() - begun

        return run

    kept = {name: getattr(RunJournal, name) for name in spent}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, call in kept.items():
                setattr(RunJournal, name, timed(name, call))
            checked = load_recipe(recipe, [*words, f"output.dir={folder}/run"])
            summary, path = train(checked)
        finally:
            for name, call in kept.items():
                setattr(RunJournal, name, call)
        ledger = Ledger(Path(path) / LEDGER)
        bytes_ = (ledger.end - ledger.end_of(0)) / ledger.steps
    return {**spent, "seconds": summary["seconds"], "steps": ledger.steps, "bytes": bytes_}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    asked = parser.parse_args()
    words = [*(asked.words or WORDS), f"trainer.steps={asked.steps}"]
    print(f"{asked.recipe} {' '.join(words)}, {torch.get_num_threads()} thread")
    rounds = []
    for _ in range(asked.rounds):
        found = measured(asked.recipe, words)
        one = {
            "bytes": found["bytes"],
            "append_share": found["append"] / found["seconds"],
            "snapshot_share": found["snapshot"] / found["seconds"],
            "step_ms": 1e3 * found["seconds"] / found["steps"],
        }
        rounds.append(one)
        print(
            f"{one['bytes']:.0f} bytes a step; appending {one['append_share']:.2%} of a step of "
            f"{one['step_ms']:.2f} ms; snapshots {one['snapshot_share']:.2%} of the run",
            flush=True,
        )
    shares = [one["append_share"] for one in rounds]
    print(f"appending: {min(shares):.2%} fewest, {max(shares):.2%} most")
    about = {"recipe": asked.recipe, "words": words, "rounds": rounds}
    write(FOLDER / "ledger_cost.json", about)


if __name__ == "__main__":
    main()
