"""Closed-form facts of forward gradients; the rest is in the conformance suite."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.errors import BackwardError, NonFiniteError, UsageError
from fwdlearn.estimator import Estimate
from fwdlearn.estimators import ForwardGradient
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle
from fwdlearn.testing import MLP, Linear, Problem, Quadratic, slope_oracle
from fwdlearn.testing.problems import flatten

KEY = Key.root(1)
# Two-sided, for each of the z-tests below.
LIMIT = stats.norm.isf(1e-6 / 2)
SHAPES = {"w": (5, 4), "bias": (4,), "gain": ()}


def ask(
    estimator: ForwardGradient, problem: Problem, plan: Plan, key: Key = KEY, state: Any = None
) -> tuple[Estimate, Any]:
    oracle = slope_oracle(problem)
    return estimator.estimate(oracle, oracle.params, state, key=key, plan=plan)


def whole(grad: Mapping[str, Tensor]) -> Tensor:
    """[d], in the order of the names."""
    return flatten({name: grad[name].unsqueeze(0) for name in sorted(grad)})[0]


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


def near(sample: list[float], expected: float, bias: float = 0.0) -> bool:
    """Whether the mean is `expected`, but for chance and a relative bias."""
    values = torch.tensor(sample)
    error = LIMIT * float(values.std()) / math.sqrt(len(values)) + bias * expected
    return abs(float(values.mean()) - expected) < error


def vector(d: int) -> Problem:
    return Linear.random(Key.root(2), 1, {"v": (d,)})


@pytest.mark.parametrize("k", [64, 256, 448])
def test_cosines_and_lengths_of_mean_and_projection(k: int) -> None:
    """40 repeats; the formulas are for one and all k, but for terms of order 1 / d."""
    d, problem = 512, vector(512)
    exact = whole(problem.gradient())
    found: dict[str, list[tuple[float, float]]] = {"mean": [], "projection": []}
    for repeat in range(40):
        for combination, seen in found.items():
            estimator: Any = ForwardGradient("gaussian", None, combination)  # type: ignore[arg-type]
            grad = whole(ask(estimator, problem, Plan.uniform(1, k), KEY.fold(repeat))[0].grad)
            seen.append((cosine(grad, exact), float(grad.norm() / exact.norm())))
    expected = {
        "mean": (math.sqrt(k / (d + k + 1)), math.sqrt((d + k + 1) / k)),
        "projection": (math.sqrt(k / d), math.sqrt(k / d)),
    }
    for combination, seen in found.items():
        for sample, value in zip(zip(*seen, strict=True), expected[combination], strict=True):
            assert near(list(sample), value, bias=2 / d), (combination, value)
            assert torch.tensor(sample).mean() == pytest.approx(value, rel=0.03)


@pytest.mark.parametrize(
    ("law", "rank", "shape", "moment"),
    [
        ("gaussian", None, (50,), 52),
        ("rademacher", None, (50,), 50),
        ("rademacher", 1, (10, 5), 50),
    ],
)
def test_second_moment_of_one_tangent(
    law: str, rank: int | None, shape: tuple[int, ...], moment: int
) -> None:
    """E |(g.v) v|^2 is (d + 2) |g|^2 for Gaussian tangents and d |g|^2 for those of signs."""
    repeats = 20_000
    problem = Linear.random(Key.root(2), repeats, {"v": shape})
    # Every row has the same slopes and one tangent of its own.
    exact = problem.select([0] * repeats)
    estimator, plan = ForwardGradient(law, rank), Plan.uniform(repeats, 1)
    oracle = slope_oracle(exact)
    directions = Directions(KEY, oracle.params, repeats, law, rank)
    slopes = oracle.slopes(plan.row, directions, plan.direction)[1]
    square = exact.gradient()["v"].square().sum()
    squares = slopes.square() * directions.square_norms(plan.direction) / square
    assert near(squares.tolist(), moment)
    estimate = ask(estimator, exact, plan)[0]
    # Their mean has the variance of one, over their number.
    reported = float(estimate.info["variance"]) * repeats / float(square)
    assert reported == pytest.approx(moment - 1, rel=0.1)


def test_projection_solves_each_rows_own_least_squares_problem() -> None:
    problem = Quadratic.random(Key.root(3), 4, SHAPES)
    gradients = flatten(dict(sorted(problem.gradients().items())))
    plan = Plan(torch.tensor([3, 5, 2, 5]), sharing=2)
    for rank in (1, 2, None):
        estimate = ask(ForwardGradient("gaussian", rank, "projection"), problem, plan)[0]
        family = Directions(KEY, problem.params, plan.directions, "gaussian", rank)
        tangents = flatten(
            {n: family.dense(n, torch.arange(plan.directions)) for n in sorted(SHAPES)}
        )
        expected = torch.zeros(25, dtype=torch.float64)
        for row in range(4):
            own = tangents[plan.direction[plan.row == row]].T
            expected += own @ torch.linalg.lstsq(own, gradients[row]).solution / 4
        torch.testing.assert_close(whole(estimate.grad), expected)


def test_as_many_tangents_as_numbers_project_on_everything() -> None:
    problem = Quadratic.random(Key.root(3), 2, SHAPES)
    exact = whole(problem.gradient())
    for directions in (25, 40):
        estimator = ForwardGradient("gaussian", None, "projection")
        grad = whole(ask(estimator, problem, Plan.uniform(2, directions))[0].grad)
        torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("combination", ["mean", "projection"])
def test_a_guess_that_is_right_leaves_nothing_to_chance(combination: Any) -> None:
    problem = Linear.random(Key.root(4), 1, SHAPES)

    def oracle_of_truth(oracle: Any, params: Any, key: Key) -> dict[str, Tensor]:
        return {name: 100 * value for name, value in problem.gradient().items()}

    estimator = ForwardGradient(combination=combination, guess=oracle_of_truth)
    estimate = ask(estimator, problem, Plan.uniform(1, 2))[0]
    torch.testing.assert_close(whole(estimate.grad), whole(problem.gradient()))
    assert estimate.queries == 3
    if combination == "mean":
        assert float(estimate.info["variance"]) == pytest.approx(0, abs=1e-9)


def test_a_guess_takes_its_share_of_the_variance() -> None:
    """With cosine c the variance is 1 - c^2 of what it was: here half of it."""
    d, repeats = 60, 400
    problem = vector(d)
    exact = whole(problem.gradient())
    other = torch.linalg.qr(torch.stack((exact, torch.arange(d).double()), 1))[0][:, 1]
    guess = exact / exact.norm() + other

    def half(oracle: Any, params: Any, key: Key) -> dict[str, Tensor]:
        return {"v": guess}

    errors = []
    for repeat in range(repeats):
        estimator = ForwardGradient(guess=half)
        grad = whole(ask(estimator, problem, Plan.uniform(1, 1), KEY.fold(repeat))[0].grad)
        errors.append(float((grad - exact).square().sum() / exact.square().sum()))
    # The rest has d - 1 dimensions left, of which its own is one.
    assert near(errors, 0.5 * (d - 2), bias=2 / d)


def test_previous_projections_accumulate() -> None:
    """For a gradient that stays, what is missing of cos^2 shrinks by 1 - k / (d - 1) a step."""
    d, k, steps, repeats = 64, 4, 12, 40
    problem = vector(d)
    exact = whole(problem.gradient())
    estimator = ForwardGradient("gaussian", None, "projection", guess="previous")
    seen = []
    for repeat in range(repeats):
        state, last = None, 0.0
        for step in range(steps):
            key = KEY.fold(repeat).fold(step)
            estimate, state = ask(estimator, problem, Plan.uniform(1, k), key, state)
            now = cosine(whole(estimate.grad), exact)
            assert now >= last - 1e-12
            last = now
        seen.append(1 - last**2)
    assert near(seen, (1 - (k + 1) / d) * (1 - k / (d - 1)) ** (steps - 1))


def test_the_momentum_is_the_decaying_mean_of_estimates() -> None:
    problem = Quadratic.random(Key.root(3), 2, SHAPES)
    estimator, plan = ForwardGradient(guess="momentum", decay=0.5), Plan.uniform(2, 2)
    first, state = ask(estimator, problem, plan, KEY.fold(0))
    torch.testing.assert_close(whole(state), whole(first.grad))
    second, after = ask(estimator, problem, plan, KEY.fold(1), state)
    torch.testing.assert_close(whole(after), (whole(first.grad) + whole(second.grad)) / 2)


def test_a_guess_may_ask_and_says_what_it_costs() -> None:
    class Local:
        queries_per_row = 2

        def __call__(self, oracle: Any, params: Any, key: Key) -> dict[str, Tensor]:
            rows = torch.arange(oracle.rows)
            family = Directions(key, params, 1)
            oracle.losses(rows)
            slopes = oracle.slopes(rows, family, 0 * rows)[1]
            return {"w": family.dense("w", rows[:1])[0] * slopes.mean()}

    problem, plan = Quadratic.random(Key.root(3), 3, SHAPES), Plan(torch.tensor([2, 4, 3]))
    estimator = ForwardGradient(guess=Local())
    estimate = ask(estimator, problem, plan)[0]
    assert estimate.queries == 9 + 3 * 3 == estimator.traits.queries(plan)


def test_a_guess_runs_nothing_backward() -> None:
    def backward(oracle: Any, params: Any, key: Key) -> dict[str, Tensor]:
        with torch.enable_grad():
            leaf = params["w"].clone().requires_grad_()
            return {"w": torch.autograd.grad(leaf.square().sum(), leaf)[0]}

    with pytest.raises(BackwardError, match="a backward pass was asked for"):
        ask(ForwardGradient(guess=backward), Linear.random(KEY, 1, SHAPES), Plan.uniform(1, 1))


def test_rows_whose_guessed_slope_is_not_finite_are_left_out() -> None:
    problem, plan = Linear.random(Key.root(4), 3, SHAPES), Plan.uniform(3, 2, sharing=3)
    estimator = ForwardGradient(guess="previous")

    class Broken:
        def __init__(self, rows: list[int]) -> None:
            self.inner, self.rows, self.params = slope_oracle(problem), 3, problem.params
            self.bad, self.queries = rows, 0

        def slopes(self, row: Tensor, family: Directions, direction: Tensor) -> Any:
            losses, slopes = self.inner.slopes(row, family, direction)
            if len(row) == 3:
                slopes[self.bad] = torch.inf
            return losses, slopes

    oracle: Any = Broken([1])
    estimate, _ = estimator.estimate(oracle, problem.params, None, key=KEY, plan=plan)
    alone = ask(estimator, problem.select([0, 2]), Plan.uniform(2, 2, sharing=2))[0]
    torch.testing.assert_close(whole(estimate.grad), whole(alone.grad))
    assert int(estimate.info["nonfinite"]) == 2
    oracle = Broken([0, 1, 2])
    with pytest.raises(NonFiniteError, match="6 of 6 queries"):
        estimator.estimate(oracle, problem.params, None, key=KEY, plan=plan)


@pytest.mark.parametrize("guess", [None, "previous"])
def test_a_model_and_its_formula_agree(guess: Any) -> None:
    """An unmodified module under the engine, and the same network written out."""
    problem = MLP.random(Key.root(5), 6)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.hidden(x)))

    net = Net().double()
    net.load_state_dict(problem.params)
    batch = Batch((problem._inputs,), problem._labels)
    oracle: Any = ModelOracle(Engine(net, cross_entropy), batch)
    estimator, plan = ForwardGradient(guess=guess), Plan(torch.tensor([2, 4, 3, 2, 1, 2]), 2)
    estimate, state = estimator.estimate(oracle, oracle.params, None, key=KEY, plan=plan)
    expected, other = ask(estimator, problem, plan)
    torch.testing.assert_close(whole(estimate.grad), whole(expected.grad))
    torch.testing.assert_close(estimate.loss, expected.loss)
    key = KEY.fold(1)
    estimate, _ = estimator.estimate(oracle, oracle.params, state, key=key, plan=plan)
    expected, _ = ask(estimator, problem, plan, key, other)
    torch.testing.assert_close(whole(estimate.grad), whole(expected.grad))
    assert estimate.queries == expected.queries == estimator.traits.queries(plan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"law": "cauchy"}, "ForwardGradient(law=...) must be one of rademacher, gaussian"),
        ({"rank": 0}, "ForwardGradient(rank=...) must be a positive integer, or None"),
        ({"combination": "sum"}, "must be 'mean' or 'projection', got 'sum'."),
        ({"guess": "best"}, "must be 'momentum', 'previous', None or a callable"),
        ({"decay": 1.0}, "ForwardGradient(decay=...) must be in [0, 1), got 1.0."),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ForwardGradient(**settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"v": torch.ones(3)}, "names 'v', which is no trainable parameter; the first of them"),
        ({"w": torch.ones(5)}, "must have shape (1, 5, 4) for 'w', one direction after the other"),
    ],
)
def test_guesses_that_do_not_fit(values: dict[str, Tensor], message: str) -> None:
    def guess(oracle: Any, params: Any, key: Key) -> dict[str, Tensor]:
        return values

    with pytest.raises(UsageError, match=re.escape(message)):
        ask(ForwardGradient(guess=guess), Linear.random(KEY, 1, SHAPES), Plan.uniform(1, 1))
