"""Closed-form facts of random perturbation; the rest is in the conformance suite."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.errors import NonFiniteError, UsageError
from fwdlearn.estimator import Estimate, Estimator
from fwdlearn.estimators import SPSA, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.testing import (
    FunctionOracle,
    Linear,
    Logistic,
    Problem,
    Quadratic,
    check_estimator,
    loss_oracle,
)
from fwdlearn.testing.estimator_statistics import smoothed_gradient, z_limit
from fwdlearn.testing.problems import flatten

KEY = Key.root(1)


def ask(estimator: Estimator, problem: Problem, plan: Plan, key: Key = KEY) -> Estimate:
    oracle = loss_oracle(problem)
    return estimator.estimate(oracle, oracle.params, None, key=key, plan=plan)[0]


def whole(estimate: Estimate) -> Tensor:
    return flatten({name: value.unsqueeze(0) for name, value in estimate.grad.items()})[0]


def test_spsa_in_one_dimension_is_the_central_difference() -> None:
    params = {"x": torch.tensor(0.7, dtype=torch.float64)}
    oracle = FunctionOracle(lambda values, row: torch.exp(values["x"]), params, rows=1)
    estimate, _ = SPSA(sigma=0.1).estimate(oracle, params, None, key=KEY, plan=Plan.uniform(1, 1))
    point = params["x"]
    central = (torch.exp(point + 0.1) - torch.exp(point - 0.1)) / 0.2
    torch.testing.assert_close(estimate.grad["x"], central, rtol=1e-14, atol=0)
    assert estimate.queries == 2
    # A sign squared is one: nothing varies.
    assert float(estimate.info["variance"]) == 0
    assert float(estimate.info["coef_abs"]) == pytest.approx(float(central))


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_one_sided_error_on_a_quadratic(law: str) -> None:
    """One direction z: the coefficient is g.z + sigma / 2 z.Hz, and two-sided g.z alone."""
    generator = Key.root(2)
    problem = Quadratic.random(generator, 1, {"v": (6,)})
    sigma, plan = 0.3, Plan.uniform(1, 1)
    z = Directions(KEY, problem.params, 1, law).dense("v", torch.tensor([0]))
    at = {"v": problem.params["v"] + z}, {"v": problem.params["v"] - z}
    up, down = (problem.losses(values, torch.tensor([0])) for values in at)
    bend = up + down - 2 * problem.clean_losses()
    slope = (up - down) / 2
    one = RandomPerturbation(sigma, law=law)
    torch.testing.assert_close(
        ask(one, problem, plan).grad["v"], ((slope + sigma / 2 * bend) * z)[0]
    )
    two = SPSA(sigma, law=law)
    torch.testing.assert_close(ask(two, problem, plan).grad["v"], (slope * z)[0])


def test_leave_one_out_of_two_is_their_difference() -> None:
    problem = Linear.random(Key.root(3), 1, {"v": (5,)})
    estimator = RandomPerturbation(0.2, baseline="leave-one-out")
    estimate = ask(estimator, problem, Plan.uniform(1, 2))
    z = Directions(KEY, problem.params, 2).dense("v", torch.arange(2))
    slopes = z @ problem.gradients()["v"][0]
    expected = (slopes[0] - slopes[1]) * (z[0] - z[1]) / 2
    torch.testing.assert_close(estimate.grad["v"], expected)
    assert estimate.queries == 2


def test_spsa_and_clean_agree_on_a_linear_loss() -> None:
    problem, plan = Linear.random(Key.root(4), 3, {"w": (3, 4)}), Plan.uniform(3, 2)
    one, two = (whole(ask(e(0.1), problem, plan)) for e in (RandomPerturbation, SPSA))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("law", "rank", "factor"),
    [("rademacher", None, -1), ("rademacher", 1, -1), ("gaussian", None, +1)],
)
def test_variance_of_one_direction(law: str, rank: int | None, factor: int) -> None:
    """Trace of the covariance on a linear loss: (d - 1) |g|^2 for signs, rank one as well as full,
    (d + 1) |g|^2 for normal numbers. Many rows that are alike are many directions, each alone."""
    d, repeats = 12, 4000
    problem = Linear.random(Key.root(5), 1, {"w": (4, 3)})
    gradient = flatten(problem.gradients())[0]
    family = Directions(KEY, problem.params, repeats, law, rank)
    z = family.dense("w", torch.arange(repeats)).reshape(repeats, -1)
    errors = ((z @ gradient).unsqueeze(1) * z - gradient).square().sum(1)
    expected = (d + factor) * float(gradient.square().sum())
    deviation = float(errors.std()) / repeats**0.5
    assert abs(float(errors.mean()) - expected) < z_limit(1, repeats) * deviation
    # The estimator says so too: its `variance` is the mean of the same, over independent rows.
    alike = problem.select([0] * repeats)
    estimator = RandomPerturbation(0.1, law=law, rank=rank)
    said = float(ask(estimator, alike, Plan.uniform(repeats, 1)).info["variance"]) * repeats
    assert said == pytest.approx(expected, rel=0.2)


def test_mean_over_all_sign_patterns_is_the_smoothed_gradient() -> None:
    """Three entries: eight patterns, so the mean is a sum and needs no tolerance for chance."""
    problem, sigma = Logistic.random(Key.root(6), 2, {"v": (3,)}), 0.8
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    mean = torch.zeros(3, dtype=torch.float64)
    for z in signs:
        moved = {"v": (problem.params["v"] + sigma * z).expand(2, 3)}
        change = problem.losses(moved, torch.arange(2)) - problem.clean_losses()
        mean += change.mean() / sigma * z / 8
    family = Directions(KEY, problem.params, 1)
    sampled, error = smoothed_gradient(problem, family, sigma, Key.root(7))
    assert bool(((sampled - mean).abs() < 6 * error).all())
    plan = Plan.uniform(2, 3000)
    for estimator in (
        RandomPerturbation(sigma),
        RandomPerturbation(sigma, baseline="leave-one-out"),
        SPSA(sigma),
    ):
        estimate = ask(estimator, problem, plan)
        spread = float(estimate.info["variance"]) ** 0.5
        assert float((whole(estimate) - mean).norm()) < 6 * spread


def test_sampled_target_matches_the_closed_form_of_gaussian_smoothing() -> None:
    problem = Logistic.random(Key.root(6), 2, {"v": (3,)})
    family = Directions(KEY, problem.params, 1, "gaussian", None)
    sampled, error = smoothed_gradient(problem, family, 0.8, Key.root(8))
    smoothed = problem.smoothed(0.8)
    assert smoothed is not None
    assert bool(((sampled - smoothed["v"].mean(0)).abs() < 6 * error).all())


def test_private_directions_vary_less_than_shared_where_rows_agree() -> None:
    """Eight rows that are alike: private directions have an eighth of the variance."""
    problem = Linear.random(Key.root(9), 1, {"w": (5, 4)}).select([0] * 8)
    estimator, said = RandomPerturbation(0.1), {}
    for sharing in (1, 8):
        plan = Plan.uniform(8, 4, sharing)
        values = [
            float(ask(estimator, problem, plan, Key.root(seed)).info["variance"])
            for seed in range(100)
        ]
        said[sharing] = sum(values) / 100
    assert said[8] / said[1] == pytest.approx(8, rel=0.3)


@pytest.mark.parametrize("kind", [RandomPerturbation, SPSA])
def test_smaller_directions_somewhere_change_no_promise(kind: Any) -> None:
    report = check_estimator(kind(sigma=0.1, scales={"*bias": 0.25, "*w*": 3.0}))
    assert report.passed, str(report)


def test_leave_one_out_needs_two_directions() -> None:
    problem = Linear.random(Key.root(0), 2, {"v": (3,)})
    message = (
        "RandomPerturbation(baseline='leave-one-out') needs two directions a row or more; raise "
        "the allocator's directions, or use baseline='clean'."
    )
    with pytest.raises(UsageError) as error:
        ask(RandomPerturbation(baseline="leave-one-out"), problem, Plan(torch.tensor([2, 1])))
    assert str(error.value) == message


@pytest.mark.parametrize("estimator", [RandomPerturbation(), SPSA()])
def test_a_row_that_overflows_is_left_out(estimator: Estimator) -> None:
    """Its clean loss too: the other rows carry the mean."""
    problem = Linear.random(Key.root(3), 3, {"v": (5,)})
    oracle = loss_oracle(problem)
    spoiled = FunctionOracle(
        problem.losses,
        oracle.params,
        3,
        alter=lambda asked, losses: losses.masked_fill(asked.row == 1, float("inf")),
    )
    plan = Plan.uniform(3, 2, sharing=3)
    estimate, _ = estimator.estimate(spoiled, oracle.params, None, key=KEY, plan=plan)
    rest = ask(estimator, problem.select([0, 2]), Plan.uniform(2, 2, sharing=2))
    torch.testing.assert_close(estimate.grad["v"], rest.grad["v"])
    torch.testing.assert_close(estimate.loss, rest.loss)
    assert int(estimate.info["nonfinite"]) == 2 * estimator.traits.queries_per_direction
    one = FunctionOracle(
        problem.losses, oracle.params, 3, alter=lambda asked, losses: losses * float("nan")
    )
    with pytest.raises(NonFiniteError, match="6 of 6 queries gave a loss that is not finite"):
        estimator.estimate(one, oracle.params, None, key=KEY, plan=plan)


SETTINGS: list[tuple[type[Estimator], dict[str, Any], str]] = [
    (kind, settings, f"{kind.__name__}{message}")
    for kind in (RandomPerturbation, SPSA)
    for settings, message in (
        ({"sigma": 0.0}, "(sigma=...) must be positive, got 0.0."),
        ({"sigma": -1e-3}, "(sigma=...) must be positive, got -0.001."),
        ({"sigma": float("inf")}, "(sigma=...) must be positive, got inf."),
        ({"sigma": float("nan")}, "(sigma=...) must be positive, got nan."),
        ({"law": "levy"}, "(law=...) must be one of rademacher, gaussian, got 'levy'."),
        (
            {"rank": 0},
            "(rank=...) must be a positive integer, or None for independent entries, got 0.",
        ),
        ({"scales": {"*bias": 0.0}}, "(scales=...) must be positive, got 0.0 for '*bias'."),
    )
]
SETTINGS.append(
    (
        RandomPerturbation,
        {"baseline": "mean"},
        "RandomPerturbation(baseline=...) must be 'clean' or 'leave-one-out', got 'mean'.",
    )
)


@pytest.mark.parametrize(("kind", "settings", "message"), SETTINGS)
def test_refusals(kind: type[Estimator], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kind(**settings)
