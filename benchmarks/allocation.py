"""How well allocators divide queries: squared errors along a run, fine-tuning, seconds a step.

    python -m benchmarks.allocation [variance] [tuning] [seconds]

`variance`: a small network on digits, trained by backpropagation. At checkpoints of the run, the
squared error of estimates with 16 directions a row on average, over that of equal counts, beside
the best that counts can do, 1 / (1 + CV^2), and beside the allocation that knows every row's
variance. `tuning`: the same network from 94 % on, six seeds, equal queries. `seconds`: whole steps
with unequal counts over equal ones. Without a word, all three. Writes records/allocation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.logs import Log
from benchmarks.results import write
from fwdlearn.allocator import Allocator, Feedback, Plan
from fwdlearn.allocators import (
    BernoulliAllocator,
    ConfidenceSkip,
    GaussianAllocator,
    Neyman,
    Uniform,
)
from fwdlearn.counts import divide
from fwdlearn.data import Data, Rows, digits
from fwdlearn.engine import Engine
from fwdlearn.estimator import Estimate, Estimator
from fwdlearn.estimators import LikelihoodRatio, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.models import mlp
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle
from fwdlearn.signals import read
from fwdlearn.trainer import Trainer

RECORD = Path(__file__).parent.parent / "records" / "allocation"
ROWS, CHECKPOINTS, SEEDS = 64, (0, 100, 300, 1000, 3000), range(6)
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "noise in activations": LikelihoodRatio,
    "noise in weights": lambda: RandomPerturbation(1e-3),
}


@dataclass(frozen=True)
class Known(Uniform):
    """Neyman's allocation from the true deviations, which nobody has."""

    signals = frozenset({"deviation"})

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        return Plan(divide(signals["deviation"], self.budget(rows, state))), state


@dataclass(frozen=True)
class SameWeights(Uniform):
    """Equal counts with the row weights of a plan that pools: the control of pooling."""

    pooled: Any = None

    signals = frozenset({"loss"})

    def init(self) -> Any:
        return self.pooled.init()

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        plan, state = self.pooled.allocate(rows, signals, state, key=key)
        return Plan(torch.full_like(plan.counts, self.directions), 1, plan.row_weight), state

    def observe(
        self, plan: Plan, signals: Mapping[str, Tensor], feedback: Feedback, state: Any
    ) -> Any:
        return self.pooled.observe(plan, signals, feedback, state)


def rules(directions: int) -> dict[str, Allocator]:
    """Name -> allocator, all of one budget."""
    pooled = BernoulliAllocator(directions, pooled=True)
    return {
        "uniform": Uniform(directions),
        "residual": Neyman(directions),
        "loss": Neyman(directions, "loss"),
        "running": Neyman(directions, "running"),
        "gaussian": GaussianAllocator(directions),
        "bernoulli": BernoulliAllocator(directions),
        "confidence skip": ConfidenceSkip(directions),
        "bernoulli, pooled": pooled,
        "uniform, weights of pooled": SameWeights(directions, pooled=pooled),
    }


def centred() -> Data:
    """Digits minus the mean image."""
    data = digits()
    assert isinstance(data.train, Rows) and isinstance(data.evaluation, Rows)
    middle = data.train.inputs.mean(0)
    parts = [Rows(rows.inputs - middle, rows.targets) for rows in (data.train, data.evaluation)]
    return Data(data.info, *parts)


def network(data: Data, seed: int = 0) -> nn.Module:
    """64-64-32-10 with ReLU, drawn as He et al. (2015) do it."""
    model = mlp(data.info, hidden=(64, 32), seed=seed).module
    generator = torch.Generator().manual_seed(seed)
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    return model


def descend(model: nn.Module, data: Rows, steps: int, rate: float, key: Key) -> None:
    """Backpropagation with Adam, on random batches."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        batch = data.batch(key.fold(step).permutation(len(data))[:ROWS])
        optimizer.zero_grad()
        cross_entropy(model(*batch.args), batch.targets).mean().backward()
        optimizer.step()


def gradients(model: nn.Module, batch: Any) -> Tensor:
    """[rows, d], exact, parameters in the order of their names."""
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, params, (x[None],))
        return cross_entropy(output, y[None]).sum()

    per_row = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    found = per_row(params, *batch.args, batch.targets)
    return torch.cat([found[name].flatten(1) for name in sorted(params)], 1)


def flat(estimate: Estimate) -> Tensor:
    """[d], parameters in the order of their names."""
    return torch.cat([estimate.grad[name].flatten() for name in sorted(estimate.grad)])


class Bench:
    """One checkpoint: fixed weights, fixed batches, exact gradients, the variance of every row."""

    def __init__(
        self, model: nn.Module, data: Rows, estimator: Estimator, batches: int, rows: int = ROWS
    ) -> None:
        self.engine, self.estimator, self.rows = Engine(model, cross_entropy), estimator, rows
        self.examples = [Key.root(7).fold(n).permutation(len(data))[:rows] for n in range(batches)]
        self.batches = [data.batch(index) for index in self.examples]
        self.exact = [gradients(model, batch) for batch in self.batches]
        self.state = self.estimator.init(dict(self.engine.params))
        for number in range(8):
            self._estimate(number % batches, Plan.uniform(rows, 16), Key.root(8).fold(number))
        self.variance = [self._of_rows(number) for number in range(batches)]

    def _estimate(self, number: int, plan: Plan, key: Key, oracle: Any = None) -> Estimate:
        oracle = oracle or ModelOracle(self.engine, self.batches[number])
        made, self.state = self.estimator.estimate(
            oracle, oracle.params, self.state, key=key, plan=plan
        )
        return made

    def _of_rows(self, number: int, directions: int = 64) -> Tensor:
        """[rows]: the squared error of one direction, from the error of many."""
        found, batch, state = [], self.batches[number], self.state
        for row in range(self.rows):
            oracle = ModelOracle(self.engine, batch.select(torch.tensor([row])))
            key = Key.root(9).fold(number).fold(row)
            plan = Plan.uniform(1, directions)
            made, _ = self.estimator.estimate(oracle, oracle.params, state, key=key, plan=plan)
            error = flat(made) - self.exact[number][row]
            found.append(directions * float(error.square().sum()))
        return torch.tensor(found, dtype=torch.float64)

    def best(self) -> float:
        """The least squared error over that of equal counts, without a floor."""
        least = sum(float(v.sqrt().mean() ** 2) for v in self.variance)
        return least / sum(float(v.mean()) for v in self.variance)

    def errors(self, rule: Allocator, passes: int, warm: int) -> list[float]:
        """Squared errors over the squared gradient, one mean for each pass over the batches."""
        state, errors = rule.init(), []
        size = sum(float(g.mean(0).square().sum()) for g in self.exact)
        for number in range(-warm, passes):
            total = 0.0
            for place, batch in enumerate(self.batches):
                key = Key.root(10).fold(number + warm).fold(place)
                oracle = ModelOracle(self.engine, batch)
                wanted = rule.signals - {"deviation"}
                signals = read(wanted, oracle, batch, self.examples[place], keep=True)
                signals["deviation"] = self.variance[place].sqrt()
                plan, state = rule.allocate(self.rows, signals, state, key=key.fold("plan"))
                made = self._estimate(place, plan, key, oracle)
                told = Feedback(float(made.loss), 0.0, {}, 0.0, made.rows)
                state = rule.observe(plan, signals, told, state)
                error = flat(made) - self.exact[place].mean(0)
                total += float(error.square().sum())
            if number >= 0:
                errors.append(total / size)
        return errors


def variance(job: tuple[str, int]) -> list[dict[str, Any]]:
    """Every rule at one checkpoint with one estimator."""
    torch.set_num_threads(1)
    name, steps = job
    data = centred()
    model = network(data)
    assert isinstance(data.train, Rows)
    descend(model, data.train, steps, 1e-3, Key.root(1))
    accuracy = float((model(data.train.inputs).argmax(1) == data.train.targets).float().mean())
    bench = Bench(model, data.train, ESTIMATORS[name](), batches=6 if steps == 300 else 3)
    base = bench.errors(Uniform(16), passes=8, warm=0)
    found = []
    for label, rule in {**rules(16), "oracle": Known(16)}.items():
        learns = label.startswith(("gaussian", "bernoulli", "running", "uniform,"))
        errors = bench.errors(rule, passes=8, warm=8 if learns else 0)
        ratio = mean(errors) / mean(base)
        found.append(
            {
                "estimator": name,
                "steps": steps,
                "accuracy": accuracy,
                "rule": label,
                "error": mean(errors),
                "deviation": stdev(errors) / math.sqrt(len(errors)),
                "of_uniform": ratio,
                "best": bench.best(),
            }
        )
    return found


def start(data: Data, seed: int) -> nn.Module:
    """Backpropagation on 350 images, to about 94 % of the test rows."""
    model = network(data, seed)
    assert isinstance(data.train, Rows)
    some = Key.root(seed).fold("some").permutation(len(data.train))[:350]
    rows = Rows(data.train.inputs[some], data.train.targets[some])
    descend(model, rows, 300, 1e-3, Key.root(seed).fold("start"))
    return model


def tuned(job: tuple[str, int, int]) -> dict[str, Any]:
    """One run of fine-tuning: rule, directions, seed."""
    torch.set_num_threads(1)
    label, directions, seed = job
    data = centred()
    model = start(data, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    rule = rules(directions).get(label.removeprefix("backprop, "), Uniform(directions))
    log, epoch = Log(), len(data.train) // ROWS
    trainer = Trainer(
        model,
        data,
        cross_entropy,
        LikelihoodRatio(),
        rule,
        optimizer,
        batch_size=ROWS,
        steps=10 * epoch,
        seed=seed,
        log_every=epoch,
        sinks=[log],
    )
    before = trainer.evaluate()["accuracy"]
    spent = 0
    if label.startswith("backprop"):
        losses = _backprop(trainer, rule)
        curve = [mean(losses[n : n + epoch]) for n in range(0, len(losses), epoch)]
    else:
        spent = trainer.train()["queries"]
        curve = [loss for _, loss in log.curve("train.loss")]
    after, fitted = trainer.evaluate(), trainer.evaluate(data.train)
    return {
        "rule": label,
        "directions": directions,
        "seed": seed,
        "start": before,
        "queries": spent,
        "train_loss": fitted["loss"],
        "accuracy": after["accuracy"],
        "curve": curve,
    }


def _backprop(trainer: Trainer, rule: Allocator) -> list[float]:
    """True gradients on the same batches, with the row weights of the rule's plans.

    Returns:
        The mean loss of each step's rows.
    """
    state, seen = rule.init(), []
    for step in range(trainer.steps or 0):
        batch = trainer.batch(step)
        losses = cross_entropy(trainer.model(*batch.args), batch.targets)
        signals = {"loss": losses.detach()}
        seen.append(float(losses.detach().mean()))
        plan, state = rule.allocate(
            len(batch), signals, state, key=Key.root(trainer.seed).fold(step)
        )
        square = gradients(trainer.model, batch).square().sum(1).double()
        told = Feedback(0.0, 0.0, {}, 0.0, {"square_slope": square})
        state = rule.observe(plan, signals, told, state)
        weight = plan.row_weight
        loss = losses.mean() if weight is None else (weight.float() * losses).sum()
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        if trainer.schedule is not None:
            trainer.schedule.step()
    return seen


def seconds() -> list[dict[str, Any]]:
    """Seconds of whole steps with unequal counts over equal ones, at equal queries."""
    data, found = centred(), []
    assert isinstance(data.train, Rows)
    for name, width in (("digits, mlp 64-32", None), ("digits, mlp 512-512", 512)):
        runs = {}
        for label, rule in (("uniform", Uniform(16)), ("residual", Neyman(16))):
            for kind, make in ESTIMATORS.items():
                model = start(data, 0)
                if width:
                    model = mlp(data.info, hidden=(width, width)).module
                    descend(model, data.train, 60, 1e-3, Key.root(1))
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
                trainer = Trainer(
                    model, data, cross_entropy, make(), rule, optimizer, batch_size=ROWS, steps=1
                )
                runs[kind, label] = _stepper(trainer)
        taken: dict[Any, list[float]] = {key: [] for key in runs}
        for number in range(43):
            for key, step in runs.items():
                begun = time.perf_counter()
                step(number)
                taken[key].append(time.perf_counter() - begun)
        for kind in ESTIMATORS:
            equal, ragged = (median(taken[kind, label][3:]) for label in ("uniform", "residual"))
            found.append({"model": name, "estimator": kind, "uniform": equal, "residual": ragged})
    return found


def _stepper(trainer: Trainer) -> Callable[[int], None]:
    state, plans = trainer.estimator.init(trainer.engine.params), trainer.allocator.init()

    def step(number: int) -> None:
        made, _, _ = trainer._estimate(number, state, plans)
        trainer._update(made.estimate, made.names)

    return step


def interval(values: list[float]) -> str:
    """Mean and half of a 95 % interval by Student's t."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):+.4f} ± {half:.4f}"


def show_variance(results: list[dict[str, Any]]) -> None:
    for kind, steps in itertools.product(ESTIMATORS, CHECKPOINTS):
        mine = [r for r in results if (r["estimator"], r["steps"]) == (kind, steps)]
        if mine:
            print(
                f"\n{kind}, {steps} steps, {mine[0]['accuracy']:.1%} of the training rows right;",
                end="",
            )
            print(f" best possible {mine[0]['best']:.3f}")
        for r in mine:
            print(
                f"  {r['rule']:28}{r['error']:10.3f} ± {r['deviation']:.3f}{r['of_uniform']:9.3f}"
            )


def show_tuning(results: list[dict[str, Any]]) -> None:
    by: dict[tuple[str, int], dict[int, Any]] = {}
    for r in results:
        by.setdefault((r["rule"], r["directions"]), {})[r["seed"]] = r
    print(f"\n{'rule':30}{'n':>4}{'train loss':>12}{'test':>8}   train loss minus uniform's at 16")
    for (rule, directions), runs in by.items():
        loss = mean(r["train_loss"] for r in runs.values())
        accuracy = mean(r["accuracy"] for r in runs.values())
        other = by["uniform", 16]
        gap = [runs[seed]["train_loss"] - other[seed]["train_loss"] for seed in runs]
        print(f"{rule:30}{directions:4}{loss:12.4f}{accuracy:8.3f}   {interval(gap)}")
    print(f"start: {mean(r['start'] for r in results):.3f} of the test rows")


def plot(results: Mapping[str, Any]) -> None:
    """Errors along the run, and losses along the fine-tuning."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = next(iter(ESTIMATORS))
    mine = sorted(
        (r for r in results["variance"] if r["estimator"] == first), key=lambda r: int(r["steps"])
    )
    for rule in dict.fromkeys(r["rule"] for r in mine):
        line = [(r["steps"], r["of_uniform"]) for r in mine if r["rule"] == rule]
        left.plot(*zip(*line, strict=True), "o-", label=rule)
    best = {r["steps"]: r["best"] for r in mine}
    left.plot(list(best), list(best.values()), "k--", label="best")
    left.set_xscale("symlog", linthresh=100)
    left.set(yscale="log", xlabel="steps of training", ylabel="squared error over uniform's")
    by: dict[tuple[str, int], list[list[float]]] = {}
    for r in results["tuning"]:
        by.setdefault((r["rule"], r["directions"]), []).append(r["curve"])
    for (rule, directions), curves in by.items():
        means = [mean(values) for values in zip(*curves, strict=True)]
        epochs, style = range(1, len(means) + 1), ":" if "pooled" in rule else "-"
        label = rule if "backprop" in rule else f"{rule}, {directions}"
        right.plot(epochs, means, style if directions == 4 else "--", label=label)
    right.set(yscale="log", xlabel="epochs of fine-tuning", ylabel="training loss, mean of 6 seeds")
    for panel in (left, right):
        panel.legend(fontsize=7)
    figure.savefig(RECORD / "allocation.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocation")
    parser.add_argument("parts", nargs="*", help="variance, tuning, seconds")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    asked = parser.parse_args()
    parts = asked.parts or ["variance", "tuning", "seconds"]
    path = RECORD / "results.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    with ProcessPoolExecutor(asked.workers) as pool:
        if "variance" in parts:
            first, *others = ESTIMATORS
            jobs = [(first, steps) for steps in CHECKPOINTS] + [(name, 300) for name in others]
            results["variance"] = [r for found in pool.map(variance, jobs) for r in found]
            show_variance(results["variance"])
        if "tuning" in parts:
            few = ("backprop", "backprop, bernoulli, pooled", *rules(4))
            labels = [(label, 4) for label in few] + [("uniform", 16), ("residual", 16)]
            runs = [(*label, seed) for label in labels for seed in SEEDS]
            results["tuning"] = list(pool.map(tuned, runs))
            show_tuning(results["tuning"])
    if "seconds" in parts:
        results["seconds"] = seconds()
        for r in results["seconds"]:
            print(f"{r['model']:24}{r['estimator']:24}{1e3 * r['uniform']:8.2f} ms uniform", end="")
            print(f"{1e3 * r['residual']:8.2f} ms residual{r['residual'] / r['uniform']:8.3f}")
    write(path, results)
    if "variance" in results and all("curve" in r for r in results.get("tuning", [])):
        plot(results)


if __name__ == "__main__":
    main()
