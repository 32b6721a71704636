"""What the checks of an estimator share: one call of it, small problems, and how to compare.

All problems are tiny and float64, all answers come from oracles that count and remember. Each call
gets its own copy of the parameters, of the plan and of the estimator, and starts from the same
state of the global generators, so that a fault shows in the check that looks for it and not in
all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.estimator import Estimate, Estimator
from fwdlearn.keys import Key
from fwdlearn.noise import Noise
from fwdlearn.oracle import ActivationOracle, SlopeOracle, TimeOracle
from fwdlearn.testing.oracles import (
    ActivationFunctionOracle,
    Asked,
    FunctionOracle,
    SlopeFunctionOracle,
    TimeFunctionOracle,
)
from fwdlearn.testing.problems import Linear, Problem, Quadratic, flatten
from fwdlearn.testing.report import NotApplicable, disturb
from fwdlearn.testing.settings import fresh

# The seed of all checks, chosen once.
ROOT = Key.root(20_261_122)
# A matrix twice in the same shape, a kernel, a vector and a scalar: 57 numbers, far more than the
# directions of the plans below, so that a gradient determines its coefficients.
SHAPES = {"w": (5, 4), "k": (2, 3, 2), "bias": (4,), "gain": (), "head": (5, 4)}

Alter = Callable[[Asked, Tensor], Tensor]
_ORACLES: Mapping[type, type[FunctionOracle]] = {
    SlopeOracle: SlopeFunctionOracle,
    ActivationOracle: ActivationFunctionOracle,
    TimeOracle: TimeFunctionOracle,
}


@dataclass(frozen=True)
class Answer:
    """One call of an estimator: what came out, and what the oracle saw."""

    estimate: Estimate
    state: Any
    grad: dict[str, Tensor]
    oracle: FunctionOracle

    @property
    def flat(self) -> Tensor:
        """[d], in the order of the parameters."""
        return flatten({name: self.grad[name].unsqueeze(0) for name in self.oracle.params})[0]


@dataclass
class EstimatorCase:
    """An estimator under test, and what its checks share."""

    estimator: Estimator
    shared: dict[str, Any] = field(default_factory=dict)

    def oracle(
        self,
        problem: Problem,
        alter: Alter | None = None,
        params: Mapping[str, Tensor] | None = None,
    ) -> FunctionOracle:
        """Offers what the estimator's traits ask for and nothing more."""
        kind = _ORACLES.get(self.estimator.traits.needs, FunctionOracle)
        if params is None:
            params = {name: value.clone() for name, value in problem.params.items()}
        return kind(problem.losses, params, problem.rows, alter=alter)

    def ask(
        self,
        problem: Problem,
        plan: Plan,
        key: Key = ROOT,
        *,
        estimator: Estimator | None = None,
        oracle: FunctionOracle | None = None,
        alter: Alter | None = None,
        **state: Any,
    ) -> Answer:
        """One call from an odd state of the global generators; each gradient is asked for once."""
        disturb()
        estimator = fresh(self.estimator) if estimator is None else estimator
        return self.ask_on(problem, plan, key, estimator, oracle, alter, **state)

    def ask_on(
        self,
        problem: Problem,
        plan: Plan,
        key: Key,
        estimator: Estimator,
        oracle: FunctionOracle | None = None,
        alter: Alter | None = None,
        **state: Any,
    ) -> Answer:
        """One call that leaves the global generators as they are."""
        oracle = self.oracle(problem, alter) if oracle is None else oracle
        with torch.no_grad():
            before = state["state"] if "state" in state else estimator.init(oracle.params)
            estimate, after = estimator.estimate(oracle, oracle.params, before, key=key, plan=plan)
            grad = {name: estimate.grad[name] for name in oracle.params}
        return Answer(estimate, after, grad, oracle)

    @property
    def rounding(self) -> float:
        """The relative error that differences of unit losses may have in float64."""
        sigma = getattr(self.estimator, "sigma", None)
        return 1e-9 + 1e4 * torch.finfo(torch.float64).eps / (sigma or 1.0)

    def with_sigma(self, sigma: float) -> Estimator:
        try:
            return dataclasses.replace(self.estimator, sigma=sigma)  # type: ignore[type-var]
        except ValueError as error:
            raise NotApplicable(f"no estimator at sigma={sigma:g}: {error}") from error


def unequal(sharing: int = 1) -> Plan:
    """Three rows of two, four and three directions (some estimators need two)."""
    return Plan(torch.tensor([2, 4, 3]), sharing)


@lru_cache
def quadratic() -> Problem:
    return Quadratic.random(ROOT.fold("quadratic"), 3, SHAPES)


@lru_cache
def linear() -> Problem:
    return Linear.random(ROOT.fold("linear"), 3, SHAPES)


def distance(left: Tensor, right: Tensor) -> float:
    """|left - right| relative to the larger of the two."""
    size = max(float(left.norm()), float(right.norm()))
    return float((left - right).norm()) / size if size else 0.0


def differing(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> int:
    """How many tensors are not bitwise the same."""
    return sum(not _same_bits(left[name], right[name]) for name in left)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    # Bytes, because equality takes -0 for 0 and no not-a-number for itself.
    return left.dtype == right.dtype and left.numpy().tobytes() == right.numpy().tobytes()


def measured(family: Directions | Noise, number: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """[n, d]: what some directions of a family, or numbers of noise, add to the parameters."""
    return flatten({name: _dense(family, name, number, params[name]) for name in params})


def _dense(family: Directions | Noise, name: str, number: Tensor, like: Tensor) -> Tensor:
    """Zeros where the family leaves a parameter alone."""
    known = family.names if isinstance(family, Noise) else family.params
    if name not in known:
        return like.new_zeros(len(number), *like.shape)
    return family.dense(name, number)


def applied(family: Directions | Noise, number: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """[n, d]: the same as they enter a gradient, divided by their squared sizes.

    Noise enters by its score, which may be another number.
    """
    parts = {}
    for name, value in params.items():
        if isinstance(family, Noise) and name in family.names:
            size = torch.tensor(1 / family.size(name), dtype=family.dtype(name))
            parts[name] = family.times(name, number, size.expand(len(number)), score=True)
        else:
            sites = {} if isinstance(family, Noise) else getattr(family, "sites", {})
            scale = sites[name].scale if name in sites else 1.0
            parts[name] = _dense(family, name, number, value) / scale**2
    return flatten(parts)
