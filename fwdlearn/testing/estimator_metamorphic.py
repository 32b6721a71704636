"""How the gradient must change when loss, rows or plan do, and what it must be made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.given import GivenDirections
from fwdlearn.testing.estimator_case import (
    Answer,
    EstimatorCase,
    applied,
    distance,
    linear,
    measured,
    quadratic,
    unequal,
)
from fwdlearn.testing.problems import Quadratic, unflatten
from fwdlearn.testing.report import Figure, NotApplicable, Suite

CHECKS: Suite[EstimatorCase] = Suite()
_check = CHECKS.check


@_check("metamorphic")
def sigma_cancels_on_linear_loss(case: EstimatorCase) -> Figure:
    """On a linear loss sigma and 10 sigma give the same gradient."""
    sigma = getattr(case.estimator, "sigma", None)
    if not isinstance(sigma, float):
        raise NotApplicable("no setting named sigma")
    narrow = case.ask(linear(), unequal()).flat
    wide = case.ask(linear(), unequal(), estimator=case.with_sigma(10 * sigma)).flat
    return Figure("relative difference", distance(narrow, wide), case.rounding)


@_check("metamorphic")
def loss_scale_scales_gradient(case: EstimatorCase) -> Figure:
    """Loss times 7 gives gradient times 7."""
    scaled = case.ask(quadratic().scaled(7.0), unequal()).flat
    plain = case.ask(quadratic(), unequal()).flat
    return Figure("relative difference", distance(7 * plain, scaled), case.rounding)


@_check("metamorphic")
def loss_shift_changes_nothing(case: EstimatorCase) -> Figure:
    """A constant added to every loss does not show in the gradient."""
    shifted = case.ask(quadratic().shifted(3.0), unequal()).flat
    plain = case.ask(quadratic(), unequal()).flat
    return Figure("relative difference", distance(plain, shifted), case.rounding)


@_check("metamorphic")
def uniform_plan_averages_rows(case: EstimatorCase) -> Figure:
    """With shared directions, a batch gives the plain average of what its rows give alone."""
    problem = quadratic()
    batch = case.ask(problem, Plan.uniform(3, 4, sharing=3)).flat
    alone = [case.ask(problem.select([row]), Plan.uniform(1, 4)).flat for row in range(3)]
    return Figure("relative difference", distance(batch, torch.stack(alone).mean(0)), case.rounding)


@_check("metamorphic")
def row_order_changes_nothing(case: EstimatorCase) -> Figure:
    """Rows in another order, each with the directions that it had, give the same gradient."""
    problem, order = quadratic(), [2, 0, 1]
    worst = 0.0
    for plan in (unequal(), unequal(sharing=3)):
        moved = Plan(plan.counts[order], plan.sharing)
        numbers = [plan.direction[plan.row == row] for row in order]
        # A cached property: the plan is the one of the reordered rows but for these numbers.
        moved.__dict__["direction"] = torch.cat(numbers)
        one, other = case.ask(problem, plan), case.ask(problem.select(order), moved)
        worst = max(worst, distance(one.flat, other.flat))
    return Figure("relative difference", worst, case.rounding)


@_check("metamorphic")
def loss_is_mean_over_rows(case: EstimatorCase) -> Figure:
    """The reported loss is the mean over rows, not over queries (at a sigma near zero)."""
    problem, estimator, limit = linear(), case.estimator, 1e-9
    if hasattr(estimator, "sigma"):
        estimator, limit = case.with_sigma(1e-6), 1e-4
    loss = case.ask(problem, unequal(), estimator=estimator).estimate.loss
    return Figure("error", abs(float(loss - problem.clean_losses().mean())), limit)


@dataclass(frozen=True)
class _Span:
    """The distinct directions that an oracle was asked about.

    Args:
        measured: [directions, d].
        applied: [directions, d], as they enter a gradient: divided by their squared sizes.
        rows: which rows asked about each; none where the direction was given, not drawn.
    """

    measured: Tensor
    applied: Tensor
    rows: list[set[int]]

    def mates(self, number: int, row: int) -> int:
        """How many directions of a row have a part in a parameter that this one has a part in."""
        seen = self.measured != 0
        return sum(
            row in users and bool((seen[number] & seen[other]).any())
            for other, users in enumerate(self.rows)
        )

    @property
    def even(self) -> bool:
        """Whether each row has as many directions for one perturbed parameter as for another."""
        owned = torch.tensor([[row in users for users in self.rows] for row in range(3)])
        counts = owned.double() @ (self.measured != 0).double()
        counts = counts[:, counts.sum(0) > 0]
        return bool((counts == counts[:, :1]).all())

    def slope_one(self, number: int) -> Tensor:
        """[d]: a gradient with slope 1 along that direction and 0 along all others."""
        return torch.linalg.pinv(self.measured)[:, number]

    def coefficients(self, grad: Tensor) -> Tensor:
        """[directions], of a gradient [d]."""
        return grad @ torch.linalg.pinv(self.applied)


def _span(answer: Answer) -> _Span:
    vectors, rows = [], []
    for asked in answer.oracle.asked:
        family, number = asked.directions, asked.direction
        if family is None or number is None:
            continue
        params = answer.oracle.params
        vectors.append(
            torch.cat([measured(family, number, params), applied(family, number, params)], 1)
        )
        drawn = not isinstance(family, GivenDirections)
        rows.append(asked.row if drawn else torch.full_like(asked.row, -1))
    if not vectors:
        raise NotApplicable("it asked for no directions")
    distinct, index = torch.unique(torch.cat(vectors), dim=0, return_inverse=True)
    users: list[set[int]] = [set() for _ in distinct]
    for number, row in zip(index.tolist(), torch.cat(rows).tolist(), strict=True):
        users[number] |= {row} - {-1}
    ways, steps = distinct.chunk(2, dim=1)
    if len(ways) > ways.shape[1] or torch.linalg.matrix_rank(ways) < len(ways):
        raise NotApplicable("it asked for more directions than this problem can tell apart")
    return _Span(ways, steps, users)


def _residual(answer: Answer, span: _Span) -> dict[str, float]:
    """For each tensor, the part of the gradient that the directions do not explain."""
    explained = span.coefficients(answer.flat) @ span.applied
    fit = unflatten(explained.unsqueeze(0), answer.oracle.params)
    return {name: distance(answer.grad[name], fit[name][0]) for name in answer.grad}


@_check("metamorphic")
def directions_measured_are_applied(case: EstimatorCase) -> Figure:
    """Every tensor of `grad` is a combination of the directions that the oracle was asked about,
    with the same coefficients in every tensor."""
    answer = case.ask(linear(), unequal())
    residual = _residual(answer, _span(answer))
    worst = max(residual, key=lambda name: residual[name])
    return Figure(f"part of {worst!r} outside the span", residual[worst], 1e-9)


@_check("metamorphic")
def coefficients_are_weighted_slopes(case: EstimatorCase) -> Figure:
    """A random direction of slope one, for the row that asked about it, gets the coefficient
    1 / (rows * directions of that row), whatever a baseline does to the others. Where directions
    perturb some parameters alone, those of the same ones count.

    The losses are linear, with slopes made after the directions are known: along one of them the
    slope is one, along all others zero.
    """
    if case.estimator.traits.target == "biased":
        raise NotApplicable("its target is declared as biased")
    answer = case.ask(linear(), unequal())
    span, params = _span(answer), answer.oracle.params
    if not span.even:
        raise NotApplicable("a row has more directions for some parameters than for others")
    # As well as the span allows: what lies outside it is the finding of the check before.
    limit = case.rounding + 10 * max(_residual(answer, span).values())
    worst = 0.0
    for number, users in enumerate(span.rows):
        if not users:
            continue
        slopes = torch.zeros(3, span.measured.shape[1], dtype=torch.float64)
        slopes[sorted(users)] = span.slope_one(number)
        problem = Quadratic(params, slopes, torch.zeros(3, dtype=torch.float64))
        coefficient = float(span.coefficients(case.ask(problem, unequal()).flat)[number])
        weight = sum(1 / (3 * span.mates(number, row)) for row in users)
        worst = max(worst, abs(coefficient / weight - 1))
    return Figure("relative error of a coefficient", worst, limit)
