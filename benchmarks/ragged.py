"""Rows with unequal numbers of directions, against plain inference on the same flat rows.

    python -m benchmarks.ragged [--rounds N] [--only PATTERN] [--output FILE]

32 rows take 1 to 16 directions, 4 on average, whole steps as in `benchmarks/throughput.py`. Beside
them stand the same number of queries in equal parts, and padding: every row gets the most that any
row needs, and only the queries that were asked for count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import steps
from benchmarks.models import Transformer, Wide, Work, vectors
from benchmarks.options import chosen, options
from benchmarks.results import merge
from benchmarks.timing import interleaved
from fwdlearn.allocator import Plan
from fwdlearn.memory import keep_freed_pages

# A directions count -> rows that have it: few rows take most of the queries.
COUNTS = {1: 8, 2: 8, 3: 6, 4: 4, 8: 2, 10: 1, 12: 1, 16: 2}


def works() -> Mapping[str, Callable[[], Work]]:
    """Name -> what makes the workload."""
    found: dict[str, Callable[[], Work]] = {}
    for name, model, tokens, width in (
        ("blocks d=256 L=4, 64 tokens", partial(Transformer, 256, 4), 64, 256),
        ("linear d=1024, 8 tokens", partial(Wide, 1024), 8, 1024),
    ):
        found[name] = partial(_work, name, model, tokens, width)
    return found


def _work(name: str, model: Any, tokens: int, width: int) -> Work:
    return Work(name, *vectors(model, sum(COUNTS.values()), tokens, width), 4)


def counts() -> torch.Tensor:
    """int64 [32], in no order."""
    amounts = torch.tensor(list(COUNTS)).repeat_interleave(torch.tensor(list(COUNTS.values())))
    return amounts[torch.randperm(len(amounts), generator=torch.Generator().manual_seed(0))]


def measure(work: Work, rounds: int) -> list[dict[str, Any]]:
    """Every variant of one work."""
    model, batch, rows = work.model, work.batch, work.rows
    wanted = counts()
    queries, most = int(wanted.sum()), int(wanted.max())
    plans = {
        "ragged, private": Plan(wanted),
        "ragged, shared": Plan(wanted, rows),
        "equal, private": Plan.uniform(rows, queries // rows),
        "equal, shared": Plan.uniform(rows, queries // rows, rows),
        "padded, private": Plan.uniform(rows, most),
        "padded, shared": Plan.uniform(rows, most, rows),
    }
    variants = steps.plain(model, batch, plans["ragged, private"].row, {4, 8, 16, 32, 64})
    variants |= {name: steps.fold(model, batch, plan) for name, plan in plans.items()}
    seconds = interleaved(variants, rounds)
    best = min(seconds[name] for name in seconds if name.startswith("inference"))
    return [
        {
            "work": work.name,
            "variant": name,
            "seconds": total / queries,
            "of_inference": best / total,
        }
        for name, total in seconds.items()
    ]


def main() -> None:
    asked = options("ragged", rounds=7)
    keep_freed_pages()
    print(f"{torch.get_num_threads()} threads; directions of the rows: {counts().tolist()}")
    print(f"{'work':32}{'variant':20}{'ms/query':>10}{'of inference':>14}")
    results = []
    for made in chosen(works(), asked.only).values():
        for entry in measure(made(), asked.rounds):
            print(f"{entry['work']:32}{entry['variant']:20}", end="")
            print(f"{1e3 * entry['seconds']:10.4f}{entry['of_inference']:14.3f}", flush=True)
            results.append(entry)
    merge(asked.output, results, works(), asked.rounds)


if __name__ == "__main__":
    main()
