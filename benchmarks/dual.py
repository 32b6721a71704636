"""Exact slopes against plain inference, whole steps: noise, loss and update included.

    python -m benchmarks.dual [--rounds N] [--only PATTERN] [--device DEVICE]
        [--output FILE]

The cost of one slope in forward passes of its row; the denominator is the fastest plain inference
over the same rows at any batch size, objective included. Beside the structured dual with 1 to 16
directions stand `torch.func.jvp` along a dense tangent, `vmap` of it over eight, and
backpropagation: one gradient of the same rows, its cost in forward passes.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import steps
from benchmarks.models import Work, works
from benchmarks.options import chosen, options
from benchmarks.results import merge
from benchmarks.timing import interleaved
from fwdlearn.allocator import Plan
from fwdlearn.errors import MissingError
from fwdlearn.memory import keep_freed_pages

WORKS = ("blocks d=256 L=4, 8 x (4 x 64)", "MiniLM float32, 8 x (16 x 64)")
DIRECTIONS = (1, 2, 4, 8, 16)


def measure(work: Work, rounds: int) -> list[dict[str, Any]]:
    """Every variant of one work."""
    model, batch, rows = work.model, work.batch, work.rows
    index = torch.arange(rows).repeat(work.directions)
    variants = steps.plain(model, batch, index, {rows // 4, rows, 2 * rows, 4 * rows})
    counts = dict.fromkeys(variants, len(index))
    for number in DIRECTIONS:
        name = f"dual, {number} shared"
        variants[name] = steps.dual(model, batch, Plan.uniform(rows, number, rows).to(work.device))
        counts[name] = number * rows
    shared = Plan.uniform(rows, work.directions, rows).to(work.device)
    private = Plan.uniform(rows, work.directions).to(work.device)
    variants[f"dual, {work.directions} private"] = steps.dual(model, batch, private)
    variants["jvp, dense"] = steps.jvp(model, batch)
    variants[f"vmap(jvp), {work.directions} dense"] = steps.dual(model, batch, shared, "jvp")
    variants["backprop, a gradient"] = steps.backprop(model, batch)
    counts |= {"jvp, dense": rows, "backprop, a gradient": rows}

    seconds = interleaved(variants, rounds, work.device.type)
    each = {name: total / counts.get(name, len(index)) for name, total in seconds.items()}
    best = min(each[name] for name in each if name.startswith("inference"))
    return [
        {"work": work.name, "variant": name, "seconds": value, "forwards": value / best}
        for name, value in each.items()
    ]


def table(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        print(f"{entry['work']:34}{entry['variant']:24}{1e3 * entry['seconds']:10.4f}", end="")
        print(f"{entry['forwards']:10.3f}", flush=True)


def main() -> None:
    asked = options("dual", rounds=7)
    keep_freed_pages()
    print(f"{asked.device}, {torch.get_num_threads()} threads")
    print(f"{'work':34}{'variant':24}{'ms/slope':>10}{'forwards':>10}")
    results = []
    for name, made in chosen({name: works()[name] for name in WORKS}, asked.only).items():
        try:
            entries = measure(made().to(asked.device), asked.rounds)
        except MissingError as error:
            print(f"{name:34}skipped: {error}")
            continue
        table(entries)
        results += entries
    merge(asked.output, results, WORKS, asked.rounds, asked.device)


if __name__ == "__main__":
    main()
