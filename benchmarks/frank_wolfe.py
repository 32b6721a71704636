"""Frank-Wolfe from one tangent a step: averaged it converges, plain it stalls.

    python -m benchmarks.frank_wolfe [METHOD ...]

Multinomial logistic regression on digits (64 x 10 weights, all 1,797 rows, no bias) in the l1 ball
of radius 30, from zero. `ProjectedForwardGradient` asks an oracle that knows the slopes in closed
form. Writes the record; with methods named, those alone are run and the others' results are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import write
from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import ProjectedForwardGradient
from fwdlearn.keys import Key
from fwdlearn.optim import FrankWolfe
from fwdlearn.optim.sets import L1Ball

RECORD = Path(__file__).parent.parent / "records" / "frank-wolfe"
SEEDS = (0, 1, 2)
BALL = L1Ball(30.0)
ROWS = 1797
MARKS = (0, 100, 300, 1000, 2500, 5000, 10_000, 20_000)


@dataclass(frozen=True)
class Method:
    """How gradients are made and used.

    Args:
        steps: how many.
        estimator: of the gradient; None for the exact one.
        averaging: of `FrankWolfe`.
        tangents: for each row.
        delay: of `FrankWolfe`.
        seeds: of the tangents.
    """

    steps: int
    estimator: Estimator | None = ProjectedForwardGradient(law="gaussian")
    averaging: str | None = "dimension"
    tangents: int = 1
    delay: float = 8.0
    seeds: tuple[int, ...] = SEEDS


# With tangents of signs all entries tie for the vertex, and the plain method would always choose
# the first: Gaussian ones are fair to it.
SIGNS = ProjectedForwardGradient()
METHODS = {
    "exact": Method(1000, None, averaging=None, delay=2.0, seeds=(0,)),
    "plain": Method(20_000, averaging=None),
    "plain, 8 tangents": Method(2500, averaging=None, tangents=8),
    "classical": Method(20_000, averaging="classical"),
    "dimension": Method(20_000),
    "dimension, Rademacher": Method(20_000, SIGNS),
    "dimension, 8 tangents": Method(2500, tangents=8),
    "dimension, delay d": Method(5000, delay=640.0),
}


@dataclass(frozen=True)
class Regression:
    """Multinomial logistic regression: the mean cross-entropy of softmax(x W).

    Args:
        x: [rows, 64].
        onehot: [rows, 10].
    """

    x: Tensor
    onehot: Tensor

    def value(self, weight: Tensor) -> Tensor:
        """Scalar, for weights [64, 10]."""
        scores = self.x @ weight
        return (scores.logsumexp(1) - (scores * self.onehot).sum(1)).mean()

    def gradient(self, weight: Tensor) -> Tensor:
        """[64, 10], in closed form."""
        return self.x.T @ ((self.x @ weight).softmax(1) - self.onehot) / len(self.x)

    def to(self, dtype: torch.dtype) -> Regression:
        return Regression(self.x.to(dtype), self.onehot.to(dtype))

    def oracle(self, weight: Tensor) -> ClosedForm:
        """Answers with slopes at weights [64, 10]."""
        return ClosedForm(self, {"weight": weight})


class ClosedForm:
    """A SlopeOracle on all rows: the slope along V is (p - onehot) . (x V)."""

    def __init__(self, regression: Regression, params: Mapping[str, Tensor]) -> None:
        self.regression, self.params, self.rows, self.queries = regression, params, ROWS, 0
        scores = regression.x @ params["weight"]
        self.clean = scores.logsumexp(1) - (scores * regression.onehot).sum(1)
        self.error = scores.softmax(1) - regression.onehot

    def losses(self, row: Tensor, *perturbed: object) -> Tensor:
        assert not perturbed
        self.queries += len(row)
        return self.clean[row]

    def slopes(
        self, row: Tensor, directions: Directions, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `SlopeOracle.slopes`."""
        self.queries += len(row)
        x, tangents = self.regression.x, directions.dense("weight", torch.arange(directions.count))
        moved = x @ tangents.transpose(0, 1).flatten(1)
        slopes = (moved.view(ROWS, -1, 10) * self.error[:, None]).sum(2)
        return self.clean[row], slopes[row, direction]


@lru_cache(maxsize=1)
def problem() -> Regression:
    """Digits in float64, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    onehot = torch.nn.functional.one_hot(torch.from_numpy(labels), 10).double()
    return Regression(torch.from_numpy(pixels) / 16, onehot)


def least(goal: float = 1e-9) -> tuple[float, float]:
    """f*, and its certificate: the Frank-Wolfe gap, which f - f* cannot exceed.

    By projected gradients with Nesterov's extrapolation, restarted where it points uphill.
    """
    regression = problem()
    # The Hessian of the logistic loss is at most half of x^T x / rows.
    step = 2 / float(torch.linalg.matrix_norm(regression.x, 2).square() / len(regression.x))
    weight = torch.zeros(64, 10, dtype=torch.float64)
    ahead, pace = weight, 1.0
    for _ in range(100):
        for _ in range(50):
            new = BALL.project(ahead - step * regression.gradient(ahead))
            uphill = float(((ahead - new) * (new - weight)).sum()) > 0
            following = 1.0 if uphill else (1 + (1 + 4 * pace**2) ** 0.5) / 2
            ahead = new if uphill else new + (pace - 1) / following * (new - weight)
            weight, pace = new, following
        gap = _gap(regression, weight)
        if gap <= goal:
            return float(regression.value(weight)), gap
    raise RuntimeError(f"the gap is still {gap}")


def run(name: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """One run, of as many steps as the method has unless told otherwise."""
    method, exact, regression = METHODS[name], problem(), problem().to(torch.float32)
    weight = torch.nn.Parameter(torch.zeros(64, 10))
    plan = Plan.uniform(ROWS, method.tangents, ROWS)
    optimizer = FrankWolfe(
        [weight],
        set=BALL,
        averaging=method.averaging,  # type: ignore[arg-type]
        delay=method.delay,
        tangents=plan.directions,
    )
    key, curve = Key.root(seed), []
    for step in range((steps or method.steps) + 1):
        point = weight.detach()
        if step in MARKS:
            value, excess = float(exact.value(point.double())), BALL.excess(point)
            gap = {"gap": optimizer.gap, "true_gap": _gap(exact, point.double())} if step else {}
            curve.append({"step": step, "value": value, "excess": excess, **gap})
        if method.estimator is None:
            weight.grad = regression.gradient(point)
        else:
            oracle = regression.oracle(point)
            estimate, _ = method.estimator.estimate(
                oracle, oracle.params, None, key=key.fold(step), plan=plan
            )
            weight.grad = estimate.grad["weight"]
        optimizer.step()
    return {"method": name, "seed": seed, "tangents": plan.directions, "curve": curve}


def _gap(regression: Regression, weight: Tensor) -> float:
    """<gradient, weight - vertex>, which f - f* cannot exceed."""
    gradient = regression.gradient(weight)
    return float((gradient * weight).sum() - BALL.vertex(gradient).dot(gradient))


def main(names: list[str]) -> None:
    chosen = names or list(METHODS)
    lowest, certificate = least()
    runs = [run(name, seed) for name in chosen for seed in METHODS[name].seeds]
    path = RECORD / "results.json"
    if names and path.exists():
        kept = json.loads(path.read_text("utf-8"))["results"]["runs"]
        runs += [each for each in kept if each["method"] not in chosen]
    runs.sort(key=lambda each: (list(METHODS).index(each["method"]), each["seed"]))
    results = {"least": lowest, "certificate": certificate, "runs": runs}
    write(path, results)
    _table(results)
    _plot(results)


def _table(results: dict[str, Any]) -> None:
    print(f"f* = {results['least']:.9f}, gap {results['certificate']:.1e}; below, f - f*")
    print(f"{'method':34}{'seed':>5}" + "".join(f"{mark:>9}" for mark in MARKS))
    for each in results["runs"]:
        values = {point["step"]: point["value"] - results["least"] for point in each["curve"]}
        shown = "".join(f"{values[m]:9.4f}" if m in values else f"{'':9}" for m in MARKS)
        print(f"{each['method']:34}{each['seed']:5}{shown}")


def _plot(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4.2))
    for number, name in enumerate(METHODS):
        curves = [each["curve"] for each in results["runs"] if each["method"] == name]
        if not curves:
            continue
        passes = [point["step"] * METHODS[name].tangents for point in curves[0]][1:]
        lines = [[point["value"] - results["least"] for point in curve][1:] for curve in curves]
        axes.plot(passes, list(map(mean, zip(*lines, strict=True))), f"C{number}", label=name)
        for line in lines if len(lines) > 1 else ():
            axes.plot(passes, line, f"C{number}", alpha=0.25)
    axes.set(xscale="log", yscale="log", xlabel="slopes of a row", ylabel="f - f*")
    axes.set_title("Logistic regression in the l1 ball, 640 weights, single tangents", fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RECORD / "curves.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
