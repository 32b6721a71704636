"""Seconds of a query against plain inference, whole steps: noise, losses and update included.

    python -m benchmarks.throughput [--rounds N] [--only PATTERN] [--device DEVICE]
        [--compiled] [--output FILE]

The denominator is the fastest plain inference over the same rows at any batch size, objective
included. Beside the fold, with directions private to a row and shared by rows, stand the share of
its step that goes to drawing directions and to the update; copies of the weights, perturbed and run
side by side by `vmap`; backpropagation (one gradient of the same rows, its cost in forward passes);
and the recipe of the published in-place method: a normal for every weight drawn again from its
seed, four sweeps over the weights for two forward passes. Exact slopes and noise at activations
have tables of their own: `benchmarks.dual`, `benchmarks.activation_noise`.
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
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.memory import keep_freed_pages

SHARING = ("private", "shared")


def measure(work: Work, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """Every variant of one work."""
    model, batch, rows = work.model, work.batch, work.rows
    seeds = max(1, work.directions // 2)
    plans = {
        "private": Plan.uniform(rows, work.directions).to(work.device),
        "shared": Plan.uniform(rows, work.directions, work.sharing or rows).to(work.device),
    }
    index = plans["private"].row
    variants = steps.plain(model, batch, index, {rows // 8, rows // 4, rows, 2 * rows, 4 * rows})
    counts = dict.fromkeys(variants, len(index))
    for name, plan in plans.items():
        variants[f"fold, {name}"] = steps.fold(model, batch, plan)
        variants[f"noise, {name}"] = steps.noise(model, plan)
        variants[f"update, {name}"] = steps.update(model, plan)
        if compiled:
            variants[f"compiled, {name}"] = steps.fold(model, batch, plan, compile=True)
    copies = steps.fold(model, batch, plans["shared"], "copies")
    try:
        copies()
    except UsageError as refused:
        print(f"{work.name:40}copies: {refused}")
    else:
        variants["copies, shared"] = copies
    counts |= {"in place, seed replay": 2 * seeds * rows, "backprop, per row": rows}
    variants["in place, seed replay"] = steps.in_place(model, batch, seeds)
    variants["backprop, per row"] = steps.backprop(model, batch)

    patience = work.patience if work.device.type == "cpu" else 1
    seconds = interleaved(variants, max(1, rounds // patience), work.device.type)
    each = {name: total / counts.get(name, len(index)) for name, total in seconds.items()}
    best = min(each[name] for name in each if name.startswith("inference"))
    found = []
    for name, value in each.items():
        part, _, sharing = name.partition(", ")
        entry = {"work": work.name, "variant": name, "seconds": value}
        if part in ("noise", "update"):
            entry["of_step"] = value / each[f"fold, {sharing}"]
        else:
            entry["of_inference"] = best / value
        found.append(entry)
    return found


def table(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        print(f"{entry['work']:40}{entry['variant']:24}{1e3 * entry['seconds']:10.4f}", end="")
        if "of_step" in entry:
            print(f"{'':14}{entry['of_step']:9.1%}")
        else:
            print(f"{entry['of_inference']:14.3f}", flush=True)
    for sharing in SHARING:
        parts = (f"noise, {sharing}", f"update, {sharing}")
        share = sum(e["of_step"] for e in entries if e["variant"] in parts)
        print(f"{entries[0]['work']:40}{f'noise + update, {sharing}':24}{'':24}{share:9.1%}")


def main() -> None:
    asked = options("throughput", rounds=7, compiled="steps as compiled graphs too: minutes")
    keep_freed_pages()
    print(f"{asked.device}, {torch.get_num_threads()} threads")
    print(f"{'work':40}{'variant':24}{'ms/query':>10}{'of inference':>14}{'of step':>9}")
    results = []
    for name, made in chosen(works(), asked.only).items():
        try:
            work = made().to(asked.device)
        except MissingError as error:
            print(f"{name:40}skipped: {error}")
            continue
        entries = measure(work, asked.rounds, "compiled" in asked.flags)
        table(entries)
        results += entries
    merge(asked.output, results, works(), asked.rounds, asked.device)


if __name__ == "__main__":
    main()
