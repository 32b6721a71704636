"""Peak memory of exact slopes against depth, from 6 to 96 layers.

    python -m benchmarks.depth [--only PATTERN] [--output FILE]

One pass of a transformer of width 64 over 16 rows of 64 tokens: plain inference, the structured
dual with one and with eight directions, `torch.func.jvp` along one dense tangent, `vmap` of it over
eight, and backpropagation of the same rows, whose gradients go as soon as they are there. The
figure is the peak of live tensor bytes (`benchmarks/live.py`) beside weights, inputs and
directions. Draws `records/dual/memory.png` if matplotlib is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from benchmarks import steps
from benchmarks.live import LiveBytes
from benchmarks.models import Transformer, cross_entropy, vectors
from benchmarks.options import chosen, options
from benchmarks.results import write
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.keys import Key

RECORD = Path(__file__).parent.parent / "records" / "dual"
DEPTHS = (6, 12, 24, 48, 96)
WIDTH, ROWS, TOKENS = 64, 16, 64

# What runs, and what is there beforehand.
Run = tuple[Callable[[], object], int]


def inference(model: nn.Module, batch: Batch) -> Run:
    return steps.inference(model, batch, torch.arange(len(batch)), len(batch)), 0


def dual(count: int, model: nn.Module, batch: Batch) -> Run:
    engine = Engine(model, cross_entropy, memory_budget=2**40)
    directions = Directions(Key.root(0), dict(engine.params), count)
    row = torch.arange(len(batch)).repeat(count)
    number = torch.arange(count).repeat_interleave(len(batch))

    def run() -> None:
        with torch.inference_mode():
            engine.slopes(batch, row, directions, number)

    run()
    assert engine.exact.choice is not None and engine.exact.choice.rung == "dual"
    numbers = directions.expanded
    assert numbers is not None
    return run, numbers.nbytes


def dense(count: int, model: nn.Module, batch: Batch) -> Run:
    """`torch.func.jvp`, under `vmap` where there is more than one direction."""
    params = {name: value.detach() for name, value in model.named_parameters()}
    directions = Directions(Key.root(0), params, count)
    tangents = [directions.dense(name, torch.arange(count)) for name in params]

    def losses(*values: Tensor) -> Tensor:
        state = dict(zip(params, values, strict=True))
        return cross_entropy(functional_call(model, state, batch.args), batch.targets)

    def push(*some: Tensor) -> Tensor:
        return jvp(losses, tuple(params.values()), some)[1]

    def run() -> None:
        with torch.no_grad(), steps.unfused():
            vmap(push)(*tangents) if count > 1 else push(*(one[0] for one in tangents))

    return run, sum(one.nbytes for one in tangents)


def backprop(model: nn.Module, batch: Batch) -> Run:
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def run() -> None:
        cross_entropy(model(*batch.args), batch.targets).mean().backward()

    return run, 0


METHODS: Mapping[str, Callable[[nn.Module, Batch], Run]] = {
    "inference": inference,
    "dual, 1 direction": partial(dual, 1),
    "dual, 8 directions": partial(dual, 8),
    "jvp, dense": partial(dense, 1),
    "vmap(jvp), 8 dense": partial(dense, 8),
    "backprop": backprop,
}


def measure(method: str, depth: int) -> dict[str, Any]:
    model, batch = vectors(partial(Transformer, WIDTH, depth), ROWS, TOKENS, WIDTH)
    run, before = METHODS[method](model, batch)
    with LiveBytes() as live:
        run()
    return {"method": method, "depth": depth, "peak": live.peak, "directions": before}


def plot(results: list[dict[str, Any]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method in METHODS:
        mine = [entry for entry in results if entry["method"] == method]
        depths = [entry["depth"] for entry in mine]
        axes.plot(depths, [entry["peak"] / 2**20 for entry in mine], "o-", label=method)
    axes.set(xscale="log", yscale="log", xlabel="layers", ylabel="peak of live tensors, MiB")
    axes.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    RECORD.mkdir(parents=True, exist_ok=True)
    figure.savefig(RECORD / "memory.png", dpi=120)
    plt.close(figure)


def main() -> None:
    asked = options("depth", rounds=1)
    print(f"{'method':22}" + "".join(f"{depth:>10}" for depth in DEPTHS) + "   MiB, by layers")
    results: list[dict[str, Any]] = []
    for method in chosen(METHODS, asked.only):
        found = [measure(method, depth) for depth in DEPTHS]
        print(f"{method:22}" + "".join(f"{e['peak'] / 2**20:10.2f}" for e in found), flush=True)
        results += found
    results = _with_rest(results, asked.output)
    write(asked.output, results)
    plot(results)


def _with_rest(results: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Beside them what the file holds of methods that were not measured."""
    measured = {entry["method"] for entry in results}
    old = json.loads(path.read_text("utf-8"))["results"] if path.exists() else []
    found = results + [entry for entry in old if entry["method"] not in measured]
    order = list(METHODS)
    return sorted(found, key=lambda entry: (order.index(entry["method"]), entry["depth"]))


if __name__ == "__main__":
    main()
