"""Every estimator and allocator that ships passes its suite; and the suite itself works."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import pytest
import torch
from torch import Tensor

import fwdlearn.allocators
import fwdlearn.estimators
from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.noise import NoiseSum, SiteNoise
from fwdlearn.oracle import ActivationOracle, LossOracle, SlopeOracle
from fwdlearn.testing import (
    MLP,
    Linear,
    Logistic,
    Problem,
    Quadratic,
    check,
    check_allocator,
    check_estimator,
    loss_oracle,
    parametrize_with_checks,
    slope_oracle,
)
from fwdlearn.testing.report import generator_states

EVERYTHING = [
    *(getattr(fwdlearn.estimators, name) for name in fwdlearn.estimators.__all__),
    *(getattr(fwdlearn.allocators, name) for name in fwdlearn.allocators.__all__),
]
SHAPES = {"w": (3, 2), "bias": (2,), "gain": ()}
PROBLEMS: list[Problem] = [
    *(kind.random(Key.root(5), 4, SHAPES) for kind in (Linear, Quadratic, Logistic)),
    MLP.random(Key.root(5), 4),
]


@parametrize_with_checks(EVERYTHING)
def test_conforms(instance: Any, check: Any) -> None:
    check()


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """The smallest estimator that needs slopes: what a third party would write."""

    traits = Traits(SlopeOracle, "weights", "gradient", queries_per_direction=1)

    def estimate(
        self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        start = oracle.queries
        family = Directions(key, params, plan.directions)
        losses, slopes = oracle.slopes(plan.row, family, plan.direction)
        weight, dropped = plan.finite(losses.isfinite() & slopes.isfinite())
        kept = torch.where(weight > 0, slopes, 0.0).double()
        coefficients = torch.zeros(plan.directions, dtype=torch.float64)
        coefficients.index_add_(0, plan.direction, weight * kept)
        loss = (weight * torch.where(weight > 0, losses, 0.0)).sum()
        grad = DirectionGradient(family, coefficients)
        info = {"nonfinite": torch.tensor(dropped)}
        return Estimate(grad, loss, oracle.queries - start, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


def test_estimators_that_need_slopes_are_checked_too() -> None:
    report = check_estimator(ForwardGradient)
    assert report.passed, str(report)
    skipped = {r.check: r.message for r in report.results if r.status == "skipped"}
    assert skipped == {
        "sigma_cancels_on_linear_loss": "no setting named sigma",
        "variance_is_as_reported": 'it reports no info["variance"]',
    }


@dataclass(frozen=True)
class NodePerturbation(Estimator):
    """The smallest estimator that adds noise to activations."""

    sigma: float = 1e-3
    law: str = "rademacher"
    antithetic: bool = False

    @property
    def traits(self) -> Traits:
        return Traits(ActivationOracle, "activations", "smoothed", 2 if self.antithetic else 1, 1)

    def estimate(
        self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        start, row, index = oracle.queries, plan.row, plan.direction
        sizes = {name: 0.5 + 0.25 * number for number, name in enumerate(oracle.sites)}
        noise = SiteNoise(key, oracle.sites, plan.directions, self.law, sizes)
        up = oracle.noisy_losses(row, noise, index, self.sigma)
        if self.antithetic:
            down = oracle.noisy_losses(row, noise, index, -self.sigma)
            gather, centre, slopes = oracle.gather, (up + down) / 2, (up - down) / (2 * self.sigma)
        else:
            clean = oracle.clean()
            gather, centre = clean.gather, clean.losses[row]
            slopes = (up - centre) / self.sigma
        weight, dropped = plan.finite(slopes.isfinite())
        dropped *= 2 if self.antithetic else 1
        kept = torch.where(weight > 0, slopes, 0.0)
        grad = gather(NoiseSum(noise, row, index, weight * kept, plan.rows))
        loss = (weight * torch.where(weight > 0, centre, 0.0)).sum()
        queries, info = oracle.queries - start, {"nonfinite": torch.tensor(dropped)}
        params = {name: grad[name].to(value.dtype) for name, value in params.items()}
        return Estimate(params, loss, queries, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(0.5, "laplace"), cls(0.1, "gaussian", antithetic=True)]


@dataclass(frozen=True)
class LayerWise(NodePerturbation):
    """One layer at a time, each with a share of the queries."""

    def estimate(
        self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        start, clean, grad = oracle.queries, oracle.clean(), {}
        weight = plan.weight
        for name in oracle.sites:
            noise = SiteNoise(key.fold(name), oracle.sites, plan.directions, self.law, only=(name,))
            noisy = oracle.noisy_losses(plan.row, noise, plan.direction, self.sigma)
            slopes = weight * (noisy - clean.losses[plan.row]) / self.sigma
            grad |= clean.gather(
                NoiseSum(noise, plan.row, plan.direction, slopes.nan_to_num(), plan.rows)
            )
        return Estimate(grad, clean.losses.mean(), oracle.queries - start), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(0.7, "gaussian")]


def test_estimators_that_perturb_activations_are_checked_too() -> None:
    report = check_estimator(NodePerturbation)
    assert report.passed, str(report)
    skipped = {r.check: r.message for r in report.results if r.status == "skipped"}
    assert skipped == {"variance_is_as_reported": 'it reports no info["variance"]'}


def test_one_layer_at_a_time_is_checked_on_average() -> None:
    """What its mean ought to be is put together from the noise of each layer."""
    results = {r.check: r for r in check_estimator(LayerWise).results}
    assert results["mean_is_target"].status == "passed", results["mean_is_target"]


@dataclass(frozen=True)
class WithoutScores(NodePerturbation):
    """Takes Laplace noise for its own score, and forgets that layers have sizes."""

    def estimate(
        self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        start, clean = oracle.queries, oracle.clean()
        noise = SiteNoise(key, oracle.sites, plan.directions, "laplace", {"w": 0.5})
        noisy = oracle.noisy_losses(plan.row, noise, plan.direction, self.sigma)
        slopes = plan.weight * (noisy - clean.losses[plan.row]) / self.sigma
        grad = {name: torch.zeros_like(value) for name, value in params.items()}
        for name in grad:
            dense = noise.dense(name, plan.direction)
            grad[name] = torch.tensordot(slopes, dense, 1)
        return Estimate(grad, clean.losses.mean(), oracle.queries - start), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(0.5)]


def test_an_estimator_without_scores_fails() -> None:
    failed = check_estimator(WithoutScores).failed
    assert {"directions_measured_are_applied", "mean_is_target"} <= set(failed)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: type(p).__name__)
def test_gradients_of_problems_are_exact(problem: Problem) -> None:
    exact = problem.gradients()
    for row in range(problem.rows):

        def loss(params: dict[str, Tensor], row: int = row) -> Tensor:
            values = {name: value.unsqueeze(0) for name, value in params.items()}
            return problem.losses(values, torch.tensor([row]))[0]

        automatic = torch.func.grad(loss)(dict(problem.params))
        for name, value in automatic.items():
            torch.testing.assert_close(exact[name][row], value, rtol=1e-12, atol=1e-12)


def test_smoothed_gradient_of_logistic_by_hand() -> None:
    """One input of size one: the derivative is an integral over one normal number."""
    params = {"w": torch.tensor([0.3], dtype=torch.float64)}
    smoothed = Logistic(params, torch.ones(1, 1, dtype=torch.float64)).smoothed(0.7)
    assert smoothed is not None
    u = np.linspace(-12, 12, 200_001)
    density = np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi)
    integral = np.trapezoid(-1 / (1 + np.exp(0.3 + 0.7 * u)) * density, u)
    assert float(smoothed["w"][0, 0]) == pytest.approx(integral, abs=1e-9)


def test_problems_transform() -> None:
    problem = PROBLEMS[1]
    clean, gradient = problem.clean_losses(), problem.gradients()["w"]
    torch.testing.assert_close(problem.scaled(7).clean_losses(), 7 * clean)
    torch.testing.assert_close(problem.scaled(7).gradients()["w"], 7 * gradient)
    torch.testing.assert_close(problem.shifted(3).clean_losses(), clean + 3)
    assert torch.equal(problem.select([2, 0]).clean_losses(), clean[[2, 0]])
    assert torch.equal(problem.select([2, 0]).gradients()["w"], gradient[[2, 0]])


def test_oracles_follow_the_protocols_count_and_remember() -> None:
    problem = PROBLEMS[1]
    oracle, slopes = loss_oracle(problem), slope_oracle(problem)
    assert isinstance(oracle, LossOracle) and not isinstance(oracle, SlopeOracle)
    assert isinstance(slopes, SlopeOracle) and not isinstance(slopes, ActivationOracle)
    family = Directions(Key.root(1), problem.params, 3)
    row, number = torch.tensor([0, 3]), torch.tensor([2, 1])
    scale = torch.tensor([0.5, -0.1])
    losses = oracle.losses(row, family, number, scale)
    for query in range(2):
        moved = {
            name: value + scale[query].double() * family.dense(name, number[query : query + 1])
            for name, value in problem.params.items()
        }
        torch.testing.assert_close(losses[query : query + 1], problem.losses(moved, row[[query]]))
    assert oracle.queries == 2 and oracle.asked[0].scale.tolist() == scale.double().tolist()
    clean, slope = slopes.slopes(row, family, number)
    torch.testing.assert_close(clean, problem.clean_losses()[row])
    exact = sum(
        (value[row] * family.dense(name, number)).reshape(2, -1).sum(1)
        for name, value in problem.gradients().items()
    )
    torch.testing.assert_close(slope, exact)
    with pytest.raises(UsageError, match="both a family of directions and their numbers"):
        oracle.losses(row, family)
    with pytest.raises(UsageError, match=r"row must be int64 \[queries\], got torch.int32 \(2,\)"):
        oracle.losses(row.int())
    with pytest.raises(UsageError, match=r"one entry a query, got \(1,\) for 2 queries"):
        oracle.losses(row, family, number[:1])


@dataclass(frozen=True)
class Doubled(ForwardGradient):
    """Counts its queries twice."""

    def estimate(self, *args: Any, **kwargs: Any) -> tuple[Estimate, Any]:
        estimate, state = super().estimate(*args, **kwargs)
        wrong = Estimate(estimate.grad, estimate.loss, 2 * estimate.queries, estimate.info)
        return wrong, state


def test_report_is_legible() -> None:
    report = check_estimator(Doubled())
    assert not report.passed and report.failed == ("queries_reported",)
    (failure,) = (r for r in report.results if r.status == "failed")
    assert (failure.group, failure.subject) == ("accounting", "Doubled()")
    assert failure.figure is not None and failure.figure.value == 9 and failure.figure.limit == 0
    text = str(report)
    assert text.startswith("Doubled()\n")
    assert "failed    accounting    queries_reported" in text
    assert "queries miscounted: 9 (at most 0)" in text
    assert "27 passed, 1 failed, 2 skipped" in text


@dataclass(frozen=True)
class Generous(fwdlearn.allocators.Uniform):
    """Gives one direction more than it has."""

    def allocate(self, rows: int, signals: Any, state: Any, *, key: Key) -> tuple[Plan, Any]:
        plan, state = super().allocate(rows, signals, state, key=key)
        return Plan(plan.counts + 1), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


def test_failures_can_be_expected() -> None:
    assert check_allocator(Generous).failed == ("counts_sum_to_budget",)
    report = check_allocator(Generous, {"counts_sum_to_budget": "rounded up"})
    assert report.passed
    (expected,) = (r for r in report.results if r.status == "expected")
    what = "directions beyond or below the budget: 64 (at most 0)"
    assert expected.message == f"rounded up; {what}"


def test_expected_failures_must_name_checks() -> None:
    with pytest.raises(UsageError, match="'querys', which is no check; there are gradient_match"):
        check_estimator(Doubled, {"querys": "?"})


class Abstract(Estimator):
    traits = ForwardGradient.traits


class NoExamples(ForwardGradient):
    @classmethod
    def examples(cls) -> list[Self]:
        return []


class NoTraits(ForwardGradient):
    traits = None  # type: ignore[assignment]


@runtime_checkable
class CurvatureOracle(LossOracle, Protocol):
    def curvatures(self) -> Tensor: ...


class NeedsCurvature(ForwardGradient):
    traits = Traits(CurvatureOracle, "weights", "gradient", 1)


@pytest.mark.parametrize(
    ("function", "target", "message"),
    [
        (
            check_estimator,
            3,
            "a subclass of fwdlearn.estimator.Estimator .* got 3 of type int",
        ),
        (check_estimator, dict, "got the class builtins.dict"),
        (check_estimator, fwdlearn.allocators.Uniform, "got the class fwdlearn.allocators"),
        (check_allocator, ForwardGradient(), "needs a subclass of fwdlearn.allocator.Allocator"),
        (check, "SPSA", "nothing to check in 'SPSA' of type str: it is neither"),
        (check, Abstract, "Abstract is abstract: it does not define estimate, examples"),
        (check, NoExamples, r"NoExamples.examples\(\) must return instances of NoExamples"),
        (check, NoTraits, "NoTraits.traits must be a fwdlearn.estimator.Traits"),
        (check, NeedsCurvature, "NeedsCurvature needs CurvatureOracle"),
    ],
)
def test_targets_that_cannot_be_checked(function: Any, target: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        function(target)


def test_the_callers_generators_are_left_alone() -> None:
    before = generator_states()
    check_allocator(fwdlearn.allocators.Uniform())
    assert generator_states() == before


def test_testing_does_not_import_pytest() -> None:
    code = "import sys, fwdlearn.testing; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
