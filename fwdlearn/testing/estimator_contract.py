"""What every estimator promises: the form of its results, what they cost, when it raises."""

from __future__ import annotations

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.errors import FwdlearnError, NonFiniteError
from fwdlearn.testing.estimator_case import (
    ROOT,
    EstimatorCase,
    differing,
    distance,
    quadratic,
    unequal,
)
from fwdlearn.testing.oracles import Asked
from fwdlearn.testing.problems import MLP
from fwdlearn.testing.report import Figure, NotApplicable, Suite
from fwdlearn.testing.settings import frozen_figure, survival_figure

CHECKS: Suite[EstimatorCase] = Suite()
_check = CHECKS.check


# contract


@_check("contract")
def gradient_matches_parameters(case: EstimatorCase) -> Figure:
    """`grad` has the names, shapes and floating dtype of the parameters."""
    wrong = 0
    for dtype in (torch.float64, torch.float32):
        problem = MLP.random(ROOT.fold("mlp"), 3)
        params = {name: value.to(dtype) for name, value in problem.params.items()}
        answer = case.ask(problem, unequal(), oracle=case.oracle(problem, params=params))
        wrong += len(set(answer.estimate.grad) ^ set(params))
        for name, value in answer.grad.items():
            wrong += value.shape != params[name].shape or value.dtype != dtype
    return Figure("names, shapes and dtypes that differ:", wrong)


@_check("contract")
def gradient_can_be_asked_twice(case: EstimatorCase) -> Figure:
    """Asking `grad` for the same name again gives the same bits."""
    answer = case.ask(quadratic(), unequal())
    again = {name: answer.estimate.grad[name] for name in answer.grad}
    return Figure("tensors that changed:", differing(answer.grad, again))


@_check("contract")
def scalars_are_scalars(case: EstimatorCase) -> Figure:
    """`loss` and `info` are detached scalars, `queries` is an integer."""
    estimate = case.ask(quadratic(), unequal()).estimate
    wrong = int(type(estimate.queries) is not int)
    for value in (estimate.loss, *estimate.info.values()):
        wrong += not isinstance(value, Tensor) or value.dim() != 0 or value.requires_grad
    return Figure("entries of loss, queries and info of another form:", wrong)


@_check("contract")
def settings_survive(case: EstimatorCase) -> Figure:
    """eval(repr), pickle and dataclasses.replace give an equal object."""
    return survival_figure(case.estimator)


@_check("contract")
def settings_are_frozen(case: EstimatorCase) -> Figure:
    """The class is a frozen dataclass."""
    return frozen_figure(case.estimator)


@_check("contract")
def one_direction_works_or_is_refused(case: EstimatorCase) -> Figure:
    """One direction a row gives a finite gradient, or an error that names the estimator."""
    what = "gradients that are not finite, or errors that do not name the estimator:"
    try:
        answer = case.ask(quadratic(), Plan.uniform(3, 1))
    except (FwdlearnError, ValueError) as error:
        return Figure(what, int(type(case.estimator).__name__ not in str(error)))
    return Figure(what, int(not answer.flat.isfinite().all()))


# accounting


@_check("accounting")
def queries_reported(case: EstimatorCase) -> Figure:
    """`Estimate.queries` is what the oracle counted, also where it had counted before."""
    problem = quadratic()
    oracle = case.oracle(problem)
    oracle.losses(torch.tensor([0, 1]))
    answer = case.ask(problem, unequal(), oracle=oracle)
    return Figure("queries miscounted:", abs(answer.estimate.queries - (oracle.queries - 2)))


@_check("accounting")
def queries_promised(case: EstimatorCase) -> Figure:
    """`traits.queries(plan)` is what the oracle counted, whatever the counts and the sharing."""
    worst = 0
    for plan in (unequal(), unequal(3), Plan.uniform(3, 5)):
        counted = case.ask(quadratic(), plan).oracle.queries
        worst = max(worst, abs(counted - case.estimator.traits.queries(plan)))
    return Figure("queries beyond or below the promise:", worst)


# errors


@_check("errors")
def nonfinite_losses_are_dropped(case: EstimatorCase) -> Figure:
    """A direction whose loss is not finite counts as never asked for, and in info["nonfinite"];
    raising NonFiniteError will do as well."""
    problem, worst = quadratic(), 0.0
    without = case.ask(problem, Plan(torch.tensor([2, 3, 3]), 3)).flat
    for bad in (float("nan"), float("inf")):

        def spoil(asked: Asked, answer: Tensor, bad: float = bad) -> Tensor:
            return answer.masked_fill(_last_of_second(asked), bad)

        try:
            answer = case.ask(problem, unequal(3), alter=spoil)
        except NonFiniteError:
            continue
        spoiled = sum(int(_last_of_second(asked).sum()) for asked in answer.oracle.asked)
        if not spoiled:
            raise NotApplicable("it numbers its directions in its own way")
        if int(answer.estimate.info.get("nonfinite", torch.tensor(0))) != spoiled:
            return Figure(f"queries dropped but not counted, of {spoiled}:", spoiled)
        worst = max(worst, distance(answer.flat, without))
        if not answer.flat.isfinite().all() or not answer.estimate.loss.isfinite():
            return Figure("results that are not finite:", 1)
    return Figure("relative difference from never asking", worst, case.rounding)


def _last_of_second(asked: Asked) -> Tensor:
    """bool [queries]: those of the second row along the last of its four shared directions."""
    if asked.direction is None:
        return torch.zeros(len(asked.row), dtype=torch.bool)
    return (asked.row == 1) & (asked.direction == 3)


@_check("errors")
def nothing_finite_raises(case: EstimatorCase) -> Figure:
    """NonFiniteError when no loss is finite."""
    what = "estimates made of nothing:"
    try:
        case.ask(quadratic(), unequal(), alter=lambda asked, answer: answer * float("nan"))
    except NonFiniteError:
        return Figure(what, 0)
    return Figure(what, 1)
