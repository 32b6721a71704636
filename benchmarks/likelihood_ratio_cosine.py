"""Cosine of likelihood-ratio estimates to the exact gradient, at equal numbers of noisy forwards.

    python -m benchmarks.likelihood_ratio_cosine mlp
    python -m benchmarks.likelihood_ratio_cosine vit

mlp: digits, an MLP (64-64-32-10, He weights), batches of 64, 192 noisy forwards of each row, at
initialisation and after 200 Adam steps by backpropagation; every form of the estimator beside the
published recipe. vit: a vision transformer of two blocks, 512 noisy forwards, after 200 steps.
Writes the records.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import write
from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.data import digits
from fwdlearn.engine import Engine
from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import ApproximateLikelihoodRatio, LikelihoodRatio
from fwdlearn.keys import Key
from fwdlearn.models import mlp, vit
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import CleanPass, ModelOracle

RECORDS = Path(__file__).parent.parent / "records"
ROWS = 64


class Raw:
    """An oracle that hides the clean losses: what is left of an estimator without a baseline."""

    def __init__(self, oracle: ModelOracle) -> None:
        self.oracle = oracle

    def __getattr__(self, name: str) -> Any:
        return getattr(self.oracle, name)

    def clean(self) -> CleanPass:
        clean = self.oracle.clean()
        clean.__dict__["losses"] = torch.zeros(self.oracle.rows)
        return clean


PLAIN: dict[str, Any] = {"exact_head": False, "balance": False}
MLP_FORMS: dict[str, tuple[Estimator, bool]] = {
    "default: exact head, balanced": (LikelihoodRatio(), False),
    "exact head": (LikelihoodRatio(balance=False), False),
    "all layers, clean baseline": (LikelihoodRatio(**PLAIN), False),
    "all layers, leave-one-out": (LikelihoodRatio(baseline="leave-one-out", **PLAIN), False),
    "all layers, antithetic": (LikelihoodRatio(baseline="antithetic", **PLAIN), False),
    "layer by layer, antithetic": (
        LikelihoodRatio(baseline="antithetic", blocks=3, **PLAIN),
        False,
    ),
    "layer by layer, clean baseline": (LikelihoodRatio(blocks=3, **PLAIN), False),
    "all layers, raw": (LikelihoodRatio(**PLAIN), True),
    "weights, clean baseline": (LikelihoodRatio(noise="weights", **PLAIN), False),
    "gaussian": (LikelihoodRatio(law="gaussian", **PLAIN), False),
    "laplace": (LikelihoodRatio(law="laplace", **PLAIN), False),
    "sobol": (LikelihoodRatio(law="sobol", **PLAIN), False),
    "sign(z)": (ApproximateLikelihoodRatio(exact_head=False), False),
    "sign(dL z)": (ApproximateLikelihoodRatio(code="product", exact_head=False), False),
}
VIT_FORMS: dict[str, tuple[Estimator, bool]] = {
    "default: exact head, balanced": (LikelihoodRatio(), False),
    "exact head": (LikelihoodRatio(balance=False), False),
    "relative noise": (LikelihoodRatio(**PLAIN), False),
}


def trained(model: nn.Module, steps: int, seed: int) -> nn.Module:
    """After so many Adam steps by backpropagation."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in batches(Key.root(seed).fold("training"), steps):
        optimizer.zero_grad()
        cross_entropy(model(*batch.args), batch.targets).mean().backward()
        optimizer.step()
    return model


def batches(key: Key, count: int) -> Iterator[Batch]:
    data = digits().train
    for number in range(count):
        batch = data.batch(key.fold(number).permutation(len(data))[:ROWS])
        yield Batch((batch.args[0] - 0.305,), batch.targets)


def he(model: nn.Module) -> nn.Module:
    for value in model.parameters():
        if value.dim() > 1:
            nn.init.kaiming_normal_(value, nonlinearity="relu")
        else:
            nn.init.zeros_(value)
    return model


def exact(model: nn.Module, batch: Batch, names: list[str]) -> Tensor:
    params = dict(model.named_parameters())
    loss = cross_entropy(model(*batch.args), batch.targets).mean()
    return flat(
        dict(zip(names, torch.autograd.grad(loss, [params[name] for name in names]), strict=True)),
        names,
    )


def flat(gradient: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in names])


def cosines(
    model: nn.Module, form: tuple[Estimator, bool], forwards: int, count: int, settle: int
) -> dict[str, Any]:
    """Over `count` batches, after `settle` steps of few queries in which sizes settle."""
    estimator, raw = form
    engine, key = Engine(model, cross_entropy), Key.root(11)
    names, state = list(engine.params), estimator.init(engine.params)
    found, seconds, peak = [], 0.0, 0
    for number, batch in enumerate(batches(key, settle + count)):
        oracle: Any = ModelOracle(engine, batch)
        oracle = Raw(oracle) if raw else oracle
        noisy = 48 if number < settle else forwards
        plan = Plan.uniform(ROWS, noisy // estimator.traits.queries_per_direction)
        begun = process_time()
        estimate, state = estimator.estimate(
            oracle, oracle.params, state, key=key.fold("noise").fold(number), plan=plan
        )
        seconds += process_time() - begun
        if number >= settle:
            pair = flat(estimate.grad, names), exact(model, batch, names)
            found.append(float(torch.cosine_similarity(*pair, dim=0)))
    plan = Plan.uniform(ROWS, forwards // estimator.traits.queries_per_direction)
    with LiveBytes(torch.device("cpu")) as live:
        estimator.estimate(oracle, oracle.params, state, key=key, plan=plan)
        peak = live.peak
    return {
        "cosine": mean(found),
        "error": stdev(found) / len(found) ** 0.5,
        "seconds": seconds / len(found),
        "peak_bytes": peak,
    }


def equal_sizes(model: nn.Module, forwards: int, count: int) -> dict[str, Any]:
    """The same absolute noise at every layer, no exact head: where the ViT is at its hardest."""
    from fwdlearn.noise import NoiseSum, SiteNoise

    engine, key, found = Engine(model, cross_entropy), Key.root(11), []
    names = list(engine.params)
    for number, batch in enumerate(batches(key, count)):
        oracle = ModelOracle(engine, batch)
        plan, clean = Plan.uniform(ROWS, forwards), oracle.clean()
        noise = SiteNoise(key.fold("noise").fold(number), dict(oracle.sites), plan.directions)
        losses = oracle.noisy_losses(plan.row, noise, plan.direction, 0.01)
        slopes = plan.weight * (losses - clean.losses[plan.row]) / 0.01
        grad = clean.gather(NoiseSum(noise, plan.row, plan.direction, slopes, ROWS))
        pair = flat(grad, names), exact(model, batch, names)
        found.append(float(torch.cosine_similarity(*pair, dim=0)))
    return {"cosine": mean(found), "error": stdev(found) / len(found) ** 0.5}


def run(kind: str, forwards: int, count: int, settle: int) -> list[dict[str, Any]]:
    results = []
    for steps in (0, 200) if kind == "mlp" else (200,):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if kind == "mlp":
                model = he(mlp(digits().info, hidden=(64, 32)).module)
            else:
                model = vit(digits().info, patch=2, width=32, depth=2, heads=4).module
        trained(model, steps, 0)
        for value in model.parameters():
            value.grad = None
        forms = MLP_FORMS if kind == "mlp" else VIT_FORMS
        if kind == "vit":
            entry = {"form": "equal absolute noise", **equal_sizes(model, forwards, count)}
            results.append({"steps": steps, "forwards": forwards, **entry})
            print(steps, entry, flush=True)
        for name, form in forms.items():
            ready = settle if getattr(form[0], "balance", False) else 0
            entry = {"form": name, **cosines(model, form, forwards, count, ready)}
            results.append({"steps": steps, "forwards": forwards, **entry})
            print(steps, entry, flush=True)
    return results


def plot(results: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    names = list(dict.fromkeys(entry["form"] for entry in results))
    for offset, steps in ((-0.2, 0), (0.2, 200)):
        some = {entry["form"]: entry for entry in results if entry["steps"] == steps}
        if not some:
            continue
        axes.barh(
            [place + offset for place in range(len(names))],
            [some[name]["cosine"] for name in names],
            0.4,
            xerr=[some[name]["error"] for name in names],
            label="initial weights" if steps == 0 else "after 200 steps",
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="cosine to the exact gradient", title=title, xlim=(0, 1))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("mlp", "vit"))
    kind = parser.parse_args().kind
    torch.set_num_threads(1)
    forwards, count, settle = (192, 10, 20) if kind == "mlp" else (512, 3, 40)
    results = run(kind, forwards, count, settle)
    folder = RECORDS / f"likelihood-ratio-cosine-{kind}"
    write(folder / "results.json", results)
    plot(results, folder / "cosines.png", f"Digits, {kind}, {forwards} noisy forwards a row")


if __name__ == "__main__":
    main()
