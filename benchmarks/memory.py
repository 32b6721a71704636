"""Peak memory of whole steps, estimate and update, against plain inference by the same blocks.

    python -m benchmarks.memory [--rounds N] [--only PATTERN] [--output FILE]

Twice: as the bytes of live tensors, weights included, counted at every operation; and as the peak
of a fresh process that takes three steps and nothing else, smallest of the rounds. Inference has as
many rows in a pass as the fold chose for its blocks. Beside the fold stand backpropagation of the
same rows and the published in-place recipe, two forward passes a seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks import steps
from benchmarks.models import Work, large, works
from benchmarks.options import chosen, options
from benchmarks.results import merge
from fwdlearn.allocator import Plan
from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.errors import MissingError
from fwdlearn.memory import in_use_bytes, keep_freed_pages, kept_below, peak_bytes, weights_bytes

NAMES = ("blocks d=256 L=4, 8 x (4 x 64)", "MiniLM float32, 8 x (16 x 64)")
WORKS = {**{name: works()[name] for name in NAMES}, **large()}
VARIANTS = ("inference", "fold, private", "fold, shared", "in place, seed replay", "backprop")


def variant(work: Work, name: str, block: int) -> Callable[[], object]:
    """A step, or plain inference over as many rows as the fold has queries."""
    model, batch = work.model, work.batch
    private = Plan.uniform(work.rows, work.directions)
    variants: Mapping[str, Callable[[], Callable[[], object]]] = {
        "inference": lambda: steps.inference(model, batch, private.row, block),
        "fold, private": lambda: steps.fold(model, batch, private),
        "fold, shared": lambda: steps.fold(
            model, batch, Plan.uniform(work.rows, work.directions, work.rows)
        ),
        "in place, seed replay": lambda: steps.in_place(model, batch, work.directions // 2),
        "backprop": lambda: steps.backprop(model, batch),
    }
    return variants[name]()


def block_of(work: Work) -> int:
    """Rows of a block of private queries."""
    seen: list[int] = []
    fold = steps.fold(
        _Counted(work.model, seen), work.batch, Plan.uniform(work.rows, work.directions)
    )
    fold()
    seen.clear()
    fold()
    return max(seen)


class _Counted(nn.Module):
    """A model that writes down how many rows each pass has."""

    def __init__(self, model: nn.Module, seen: list[int]) -> None:
        super().__init__()
        self.model, self.seen = model, seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(len(next(iter((*args, *kwargs.values())))))
        return self.model(*args, **kwargs)


def live(work: Work, name: str, block: int) -> int:
    """Bytes of tensors at the peak of the second step, weights included."""
    step = variant(work, name, block)
    step()
    with LiveBytes(torch.device("cpu")) as counted:
        step()
    return weights_bytes(work.model) + counted.peak


def process(work: Work, name: str, block: int) -> dict[str, int]:
    """Bytes of this process before the first step and at its peak."""
    keep_freed_pages(kept_below(work.model))
    step = variant(work, name, block)
    before = in_use_bytes("cpu")
    for _ in range(3):
        step()
    return {"before": before, "peak": peak_bytes("cpu")}


def alone(work: str, name: str, block: int) -> dict[str, int]:
    """`process`, in a fresh one."""
    line = [sys.executable, "-m", "benchmarks.memory", "--alone", work, name, str(block)]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(work: Work, rounds: int) -> list[dict[str, Any]]:
    block = block_of(work)
    entries = []
    for name in VARIANTS:
        rounds = max(1, rounds // work.patience)
        runs = [alone(work.name, name, block) for _ in range(rounds)]
        peak = min(run["peak"] for run in runs)
        entry = {"work": work.name, "variant": name, "block": block}
        entry |= {"live": live(work, name, block), "process": peak}
        entry["step"] = min(run["peak"] - run["before"] for run in runs)
        entries.append(entry)
    for entry in entries:
        for kind in ("live", "process"):
            entry[f"{kind}.of_inference"] = entry[kind] / entries[0][kind]
    return entries


def table(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        print(f"{entry['work']:34}{entry['variant']:24}", end="")
        for kind in ("live", "process"):
            print(f"{entry[kind] / 2**20:10.1f}{entry[f'{kind}.of_inference']:8.3f}", end="")
        print(f"{entry['step'] / 2**20:10.1f}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        _, _, name, kind, block = sys.argv
        print(json.dumps(process(WORKS[name](), kind, int(block))))
        return
    asked = options("memory", rounds=3)
    kinds = "".join(f"{kind:>10}{'ratio':>8}" for kind in ("live MiB", "process"))
    print(f"{'work':34}{'variant':24}{kinds}{'step':>10}")
    results = []
    for name, made in chosen(WORKS, asked.only).items():
        try:
            entries = measure(made(), asked.rounds)
        except MissingError as error:
            print(f"{name:34}skipped: {error}")
            continue
        table(entries)
        results += entries
    merge(asked.output, results, WORKS, asked.rounds)


if __name__ == "__main__":
    main()
