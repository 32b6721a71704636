"""Moonwalk against backpropagation and gradient checkpointing: exactness, memory, time.

    python -m benchmarks.moonwalk

Memory is the peak of live tensor bytes beside weights and input (`benchmarks/live.py`); every
method drops each parameter's gradient as soon as it is final. A process whose memory is capped at
what backpropagation needs at one depth then shows what fits at twice that depth.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.backprop import backpropagate, prepared, reverse
from benchmarks.chains import (
    WIDTH,
    causal,
    couplings,
    gaussian,
    losses,
    perceptron,
    ramp,
    rows,
)
from benchmarks.live import LiveBytes
from benchmarks.results import FOLDER, write
from benchmarks.timing import interleaved
from fwdlearn.data import digits
from fwdlearn.keys import Key
from fwdlearn.moonwalk import Chain, Moonwalk, cnn, mlp
from fwdlearn.oracle import forbid_backward

RECORD = Path(__file__).parent.parent / "records" / "moonwalk"
BACKPROP, CHECKPOINTS, REVERSAL = "backpropagation", "checkpointing, square root", "reversal"

Results = list[dict[str, Any]]
Run = Callable[..., int | None]

# All have 64 layers.
EXACT: Mapping[str, tuple[Callable[[], Chain], tuple[int, ...], Moonwalk]] = {
    "dense, slope 0.1": (lambda: mlp(64, 64, 64, 10, slope=0.1), (64,), Moonwalk(4)),
    "dense, slope 0.2": (lambda: mlp(64, 64, 64, 10), (64,), Moonwalk(4)),
    "dense, slope 0.5": (lambda: mlp(64, 64, 64, 10, slope=0.5), (64,), Moonwalk(4)),
    "orthogonal, slope 0.2": (lambda: mlp(64, 64, 64, 10, orthogonal=True), (64,), Moonwalk(4)),
    "narrowing 128 to 32": (lambda: ramp(128, 32), (128,), Moonwalk(4)),
    "widening 32 to 128, fragments": (lambda: ramp(32, 128), (32,), Moonwalk(4)),
    "Gaussian, cutoff 0.2": (lambda: gaussian(0.2), (64,), Moonwalk(4)),
    "Gaussian, no cutoff": (lambda: gaussian(0.0), (64,), Moonwalk(4)),
    "causal convolutions": (causal, (16, 32), Moonwalk(4)),
    "couplings, anchors 4": (
        lambda: cnn((2, 16, 16), (8,), 64, 10),
        (2, 16, 16),
        Moonwalk(),
    ),
    "couplings, no anchor": (
        lambda: cnn((2, 16, 16), (8,), 64, 10),
        (2, 16, 16),
        Moonwalk(None),
    ),
}


def exactness() -> Results:
    """The largest relative error of a parameter's gradient against autograd."""
    found = []
    print(f"{'64 layers':32}{'dtype':>9}{'error':>10}{'drift':>10}{'again':>7}")
    for name, (make, shape, settings) in EXACT.items():
        for dtype in (torch.float64, torch.float32):
            chain, (x, targets) = make().to(dtype), rows(shape, 32, dtype)
            walk = settings.walk(chain, x, losses(targets))
            with forbid_backward():
                gradients = dict(walk)
            named = dict(chain.named_parameters())
            exact = torch.autograd.grad(losses(targets)(chain(x)).mean(), list(named.values()))
            pairs = zip(named, exact, strict=True)
            error = max(float((gradients[key] - g).norm() / g.norm()) for key, g in pairs)
            short = str(dtype).removeprefix("torch.")
            print(f"{name:32}{short:>9}{error:10.1e}{walk.drift:10.1e}{walk.retried:7}")
            seen = {"error": error, "drift": walk.drift, "retried": walk.retried}
            found.append({"chain": name, "dtype": short, **seen})
    return found


@dataclass(frozen=True)
class Network:
    """A family of chains, and how it is measured.

    Args:
        make: depth -> chain.
        shape: of a row.
        rows: of the batch.
        depths: for the memory.
        timed: the depth for the time.
        walks: name -> settings.
        invertible: whether all but the head can be reversed without losing digits.
    """

    make: Callable[[int], Chain]
    shape: tuple[int, ...]
    rows: int
    depths: tuple[int, ...]
    timed: int
    walks: Mapping[str, Moonwalk]
    invertible: bool

    def runs(self, chain: Chain, x: Tensor, targets: Tensor) -> dict[str, Run]:
        """Name -> one gradient by that method; each part of it is dropped once it is final."""
        objective = losses(targets)

        def walking(settings: Moonwalk) -> Run:
            def run() -> int:
                walk = settings.walk(chain, x, objective)
                for _, gradient in walk:
                    del gradient
                return walk.retried

            return run

        found: dict[str, Run] = {
            BACKPROP: lambda: backpropagate(chain, x, objective),
            CHECKPOINTS: lambda segment=1.0: backpropagate(chain, x, objective, segment),
        }
        if self.invertible:
            found[REVERSAL] = lambda: reverse(chain, x, objective)
        return found | {name: walking(settings) for name, settings in self.walks.items()}


NETWORKS: Mapping[str, Network] = {
    "perceptron": Network(
        perceptron,
        (WIDTH,),
        1024,
        (8, 16, 32, 64, 128, 256),
        64,
        {
            "moonwalk, anchors 4": Moonwalk(4),
            "moonwalk, anchors (16, 4)": Moonwalk((16, 4)),
            "moonwalk, anchors 16, float64": Moonwalk(16, dtype=torch.float64),
        },
        invertible=False,
    ),
    "couplings": Network(
        couplings,
        (8, 32, 32),
        32,
        (4, 8, 16, 32, 64, 128),
        16,
        {"moonwalk, anchors 4": Moonwalk(4), "moonwalk, anchors 16": Moonwalk(16)},
        invertible=True,
    ),
}


def peak(run: Run, *segment: float) -> tuple[int, int]:
    """Live bytes at the worst moment, and stretches walked again."""
    with LiveBytes() as live:
        retried = run(*segment)
    return live.peak, retried or 0


def memory() -> Results:
    """Peak against depth; for checkpointing with the better of two segment lengths."""
    found = []
    for title, network in NETWORKS.items():
        depths = network.depths
        print(f"\n{title + ', MiB at depth':32}" + "".join(f"{depth:9}" for depth in depths))
        x, targets = rows(network.shape, network.rows)
        chains = {depth: prepared(network.make(depth)) for depth in depths}
        for name in network.runs(chains[depths[0]], x, targets):
            sizes = {}
            for depth, chain in chains.items():
                run = network.runs(chain, x, targets)[name]
                segments = [[0.6], [1.0]] if name == CHECKPOINTS else [[]]
                size, retried = min(peak(run, *segment) for segment in segments)
                weights = sum(p.numel() * p.element_size() for p in chain.parameters())
                sizes[depth] = size
                seen = {"peak_bytes": size, "weights_bytes": weights, "retried": retried}
                found.append({"network": title, "method": name, "depth": depth, **seen})
            print(f"{name:32}" + "".join(f"{size / 2**20:9.1f}" for size in sizes.values()))
    return found


def doubled(sizes: Results) -> Results:
    """Memory at twice a depth over what backpropagation needs, without and with the weights."""
    at = {(r["network"], r["method"], r["depth"]): r for r in sizes}
    found = []
    print(f"\n{'over backpropagation at half the depth':46}", end="")
    print(f"{'depth':>6}{'beside':>9}{'with weights':>14}")
    for (network, name, depth), one in at.items():
        other = at.get((network, BACKPROP, depth // 2))
        if other is None or name == BACKPROP:
            continue
        beside = one["peak_bytes"] / other["peak_bytes"]
        total = [r["peak_bytes"] + r["weights_bytes"] for r in (one, other)]
        print(f"{network:13}{name:33}{depth:6}{beside:9.2f}{total[0] / total[1]:14.2f}")
        seen = {"beside_weights": beside, "with_weights": total[0] / total[1]}
        found.append({"network": network, "method": name, "depth": depth, **seen})
    return found


def capped(name: str, depth: int, budget: int) -> str:
    """One gradient of 4,096 rows in a process that may take `budget` bytes more than it has."""

    def memory_of(kind: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])

    torch.set_num_threads(2)
    network = NETWORKS["perceptron"]
    chain, (x, targets) = prepared(network.make(depth)), rows(network.shape, 4096)
    # Threads, libraries and their buffers come first.
    network.runs(chain, x[:8], targets[:8])[name]()
    limit = memory_of("VmData") + budget
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_of("VmRSS")
    try:
        network.runs(chain, x, targets)[name]()
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        return "out of memory"
    return f"done, {(memory_of('VmHWM') - before) / 2**20:.0f} MiB resident more"


def fits() -> Results:
    """What runs in the memory that backpropagation needs at depth 64."""
    network = NETWORKS["perceptron"]
    chain, (x, targets) = prepared(network.make(64)), rows(network.shape, 4096)
    # An eighth for what an allocator rounds up and kernels take for themselves.
    budget = peak(network.runs(chain, x, targets)[BACKPROP])[0] * 9 // 8
    print(f"\na process that may take {budget / 2**20:.0f} MiB beside weights and input")
    jobs = [(BACKPROP, 64), (BACKPROP, 128), ("moonwalk, anchors 4", 128)]
    jobs += [("moonwalk, anchors (16, 4)", 256), ("moonwalk, anchors 16, float64", 128)]
    found = []
    context = multiprocessing.get_context("spawn")
    for name, depth in jobs:
        with ProcessPoolExecutor(1, context) as pool:
            outcome = pool.submit(capped, name, depth, budget).result()
        print(f"{name:33}{depth:6}   {outcome}")
        found.append({"method": name, "depth": depth, "budget": budget, "outcome": outcome})
    return found


def seconds() -> Results:
    """Time of a gradient, 64 layers or 16 couplings."""
    found = []
    print(f"\n{'one gradient':46}{'seconds':>9}{'of backpropagation':>20}")
    for title, network in NETWORKS.items():
        chain = prepared(network.make(network.timed))
        taken = interleaved(network.runs(chain, *rows(network.shape, network.rows)))
        for name, value in taken.items():
            ratio = value / taken[BACKPROP]
            print(f"{title:13}{name:33}{value:9.3f}{ratio:20.2f}")
            found.append({"network": title, "method": name, "seconds": value, "ratio": ratio})
    return found


def trained(steps: int, settings: Moonwalk | None, moved: float = 0.0) -> dict[str, Any]:
    """Digits, 32 hidden layers, Adam in float32, first weights scaled by 1 + moved."""
    data, chain = digits(), mlp(64, 64, 32, 10)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.mul_(1 + moved)
    optimizer = torch.optim.Adam(chain.parameters(), lr=3e-4)
    curve, drift, retried = [], 0.0, 0
    for step in range(steps):
        order = Key.root(0).fold(step).permutation(len(data.train))
        batch = data.train.batch(order[:128])
        x, objective = batch.args[0].flatten(1), losses(batch.targets)
        if settings is None:
            optimizer.zero_grad()
            loss = objective(chain(x)).mean()
            loss.backward()
        else:
            walk = settings.walk(chain, x, objective)
            with forbid_backward():
                for name, gradient in walk:
                    chain.get_parameter(name).grad = gradient
            assert walk.losses is not None
            loss = walk.losses.mean()
            drift, retried = max(drift, walk.drift), retried + walk.retried
        optimizer.step()
        curve.append(round(float(loss.detach()), 6))
    assert data.evaluation is not None
    test = data.evaluation.batch(torch.arange(len(data.evaluation)))
    with torch.no_grad():
        right = chain(test.args[0].flatten(1)).argmax(1) == test.targets
    accuracy = float(right.float().mean())
    return {"accuracy": accuracy, "losses": curve, "drift": drift, "retried": retried}


def training(steps: int = 300) -> dict[str, Any]:
    """The same batches by both methods; how far rounding alone drives two runs apart."""
    found = {
        BACKPROP: trained(steps, None),
        "backpropagation, weights moved by 1e-6": trained(steps, None, 1e-6),
        "moonwalk, anchors 4": trained(steps, Moonwalk(4)),
    }
    print(f"\n{'300 steps of training':40}{'accuracy':>9}{'apart':>9}{'drift':>9}{'again':>7}")
    for name, one in found.items():
        pairs = zip(one["losses"], found[BACKPROP]["losses"], strict=True)
        one["apart"] = max(abs(a - b) for a, b in pairs)
        print(f"{name:40}{one['accuracy']:9.4f}{one['apart']:9.1e}", end="")
        print(f"{one['drift']:9.1e}{one['retried']:7}")
    return found


COLOURS = {
    BACKPROP: "C0",
    CHECKPOINTS: "C1",
    REVERSAL: "C4",
    "moonwalk, anchors 4": "C2",
    "moonwalk, anchors (16, 4)": "C3",
    "moonwalk, anchors 16": "C5",
    "moonwalk, anchors 16, float64": "C6",
}


def plot(sizes: Results) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2))
    titles = (
        "Dense 256 and leaky ReLU 0.2, 1,024 rows",
        "Couplings of 3 x 3 convolutions, 32 rows",
    )
    for axis, network, title in zip(axes, NETWORKS, titles, strict=True):
        mine = [r for r in sizes if r["network"] == network]
        for name in dict.fromkeys(r["method"] for r in mine):
            points = [(r["depth"], r["peak_bytes"] / 2**20) for r in mine if r["method"] == name]
            colour = COLOURS[name]
            axis.plot(*zip(*points, strict=True), colour, marker="o", markersize=3, label=name)
        axis.set(xlabel="depth", ylabel="peak of live tensors, MiB", title=title)
        for one, log in ((axis.xaxis, axis.set_xscale), (axis.yaxis, axis.set_yscale)):
            log("log", base=2)
            one.set_major_formatter("{x:g}")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RECORD / "memory.png", dpi=110)


def main() -> None:
    torch.set_num_threads(2)
    exact, sizes = exactness(), memory()
    results = {
        "exactness": exact,
        "memory": sizes,
        "twice_the_depth": doubled(sizes),
        "capped": fits(),
        "seconds": seconds(),
        "training": training(),
    }
    write(FOLDER / "moonwalk.json", results)
    RECORD.mkdir(parents=True, exist_ok=True)
    plot(sizes)


if __name__ == "__main__":
    main()
