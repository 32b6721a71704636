"""What every estimator must keep, one small function each. The exact checks.

All problems are tiny and float64, all answers come from oracles that count and remember. Each call
gets its own copy of the parameters, of the plan and of the estimator, and starts from the same
state of the global generators, so that a fault shows in the check that looks for it and not in
all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.errors import BackwardError, FwdlearnError, NonFiniteError
from fwdlearn.estimator import Estimate, Estimator
from fwdlearn.keys import Key
from fwdlearn.oracle import SlopeOracle, forbid_backward
from fwdlearn.testing.oracles import Asked, FunctionOracle, SlopeFunctionOracle
from fwdlearn.testing.problems import MLP, Linear, Problem, Quadratic, flatten, unflatten
from fwdlearn.testing.report import Figure, NotApplicable, Suite, disturb, generator_states
from fwdlearn.testing.settings import fresh, frozen_figure, settings_of, survival_figure

# The seed of all checks, chosen once.
ROOT = Key.root(20_261_122)
# A matrix twice in the same shape, a kernel, a vector and a scalar: 57 numbers, far more than the
# directions of the plans below, so that a gradient determines its coefficients.
SHAPES = {"w": (5, 4), "k": (2, 3, 2), "bias": (4,), "gain": (), "head": (5, 4)}

Alter = Callable[[Asked, Tensor], Tensor]


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
        kind = SlopeFunctionOracle if self.estimator.traits.needs is SlopeOracle else FunctionOracle
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


ESTIMATOR_CHECKS: Suite[EstimatorCase] = Suite()
_check = ESTIMATOR_CHECKS.check


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


# purity


@_check("purity")
def parameters_unchanged(case: EstimatorCase) -> Figure:
    """After an estimate the parameters are bitwise what they were."""
    problem = quadratic()
    answer = case.ask(problem, unequal())
    return Figure("tensors that changed:", differing(problem.params, answer.oracle.params))


@_check("purity")
def parameters_unchanged_after_error(case: EstimatorCase) -> Figure:
    """The same when the oracle raises, whichever of its answers it raises in."""
    problem, changed = quadratic(), 0
    calls = len(case.ask(problem, unequal()).oracle.asked)

    class Trouble(Exception):
        pass

    for last in range(calls):
        left = last

        def fail(asked: Asked, answer: Tensor) -> Tensor:
            nonlocal left
            if left == 0:
                raise Trouble
            left -= 1
            return answer

        oracle = case.oracle(problem, fail)
        try:
            case.ask(problem, unequal(), oracle=oracle)
        except Trouble:
            changed += differing(problem.params, oracle.params)
    return Figure("tensors that changed:", changed)


@_check("purity")
def settings_unchanged(case: EstimatorCase) -> Figure:
    """An estimate leaves the settings as they were."""
    estimator = fresh(case.estimator)
    before = settings_of(estimator)
    case.ask(quadratic(), unequal(), estimator=estimator)
    after = settings_of(estimator)
    return Figure("settings that changed:", sum(before[name] != after[name] for name in before))


@_check("purity")
def plan_unchanged(case: EstimatorCase) -> Figure:
    """An estimate leaves the plan as it was."""
    plan = unequal()
    names = ("counts", "row", "direction", "weight")
    before = {name: getattr(plan, name).clone() for name in names}
    case.ask(quadratic(), plan)
    return Figure(
        "tensors of the plan that changed:",
        differing(before, {name: getattr(plan, name) for name in names}),
    )


class GlobalDraws(TorchDispatchMode):
    """Counts random operations that take their numbers from a global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        self.count += drawn and kwargs.get("generator") is None
        return func(*args, **kwargs)


@_check("purity")
def global_generators_untouched(case: EstimatorCase) -> Figure:
    """torch's, numpy's and Python's generators are neither moved, nor read, nor restored.

    Three ways to see it: their states, the random operations that pass without a generator of
    their own, and whether their states show in the result.
    """
    problem, grads, moved = quadratic(), [], 0
    with GlobalDraws() as draws:
        for number in (11, 12):
            disturb(number)
            before = generator_states()
            answer = case.ask_on(problem, unequal(), ROOT, fresh(case.estimator))
            moved += generator_states() != before
            grads.append(answer.grad)
    seen = moved + draws.count + differing(*grads)
    return Figure("signs of use:", seen)


@_check("purity")
def same_key_same_result(case: EstimatorCase) -> Figure:
    """The same key gives the same bits: from a new object, and from one that has been used."""
    problem, estimator = quadratic(), fresh(case.estimator)
    first = case.ask(problem, unequal())
    changed = differing(first.grad, case.ask(problem, unequal()).grad)
    for key in (ROOT, ROOT.fold(1), ROOT):
        answer = case.ask(problem, unequal(), key, estimator=estimator)
        if key == ROOT:
            changed += differing(first.grad, answer.grad)
    return Figure("tensors that changed:", changed)


@_check("purity")
def other_key_other_result(case: EstimatorCase) -> Figure:
    """Either half of the key changes the result."""
    problem = quadratic()
    grad = case.ask(problem, unequal()).flat
    others = (Key(ROOT.low ^ 1, ROOT.high), Key(ROOT.low, ROOT.high ^ 1))
    same = sum(bool((case.ask(problem, unequal(), key).flat == grad).all()) for key in others)
    return Figure("other keys with the same result:", same)


@_check("purity")
def state_survives(case: EstimatorCase) -> Figure:
    """State is data: pickled and restored it gives the same next step, and no step alters it."""
    problem, lost = quadratic(), 0
    state = case.ask(problem, unequal()).state
    for step in range(1, 3):
        before = copy.deepcopy(state)
        restored = pickle.loads(pickle.dumps(state))
        answers = [
            case.ask(problem, unequal(), ROOT.fold(step), state=kept) for kept in (state, restored)
        ]
        lost += differing(answers[0].grad, answers[1].grad)
        lost += pickle.dumps(plain(before)) != pickle.dumps(plain(state))
        state = answers[0].state
    return Figure("tensors that differ after restoring, and states altered:", lost)


def plain(state: Any) -> Any:
    """Tensors as bytes, so that states compare by value."""
    if isinstance(state, Tensor):
        return str(state.dtype), tuple(state.shape), state.numpy().tobytes()
    if isinstance(state, Mapping):
        return {name: plain(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        names = [field.name for field in dataclasses.fields(state)]
        return {name: plain(getattr(state, name)) for name in names}
    return state


# forward only


class _Trap(torch.autograd.Function):
    """The identity; its derivative raises, and remembers that it was asked for."""

    sprung = 0

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _Trap.sprung += 1
        raise BackwardError("the estimator differentiated the oracle's answers.")


@_check("forward only")
def nothing_runs_backward(case: EstimatorCase) -> Figure:
    """No backward pass of its own, and none through the oracle's answers."""
    problem = quadratic()
    what = "backward passes asked for:"
    try:
        with forbid_backward():
            case.ask(problem, unequal())
    except BackwardError:
        return Figure(what, 1)

    params = {n: v.clone().requires_grad_() for n, v in problem.params.items()}
    _Trap.sprung = 0

    def differentiable(values: Mapping[str, Tensor], row: Tensor) -> Tensor:
        with torch.enable_grad():
            total = sum(value.sum() for value in params.values())
            return _Trap.apply(problem.losses(values, row) + 0 * total)

    oracle = case.oracle(problem, params=params)
    if not isinstance(oracle, SlopeOracle):
        oracle = FunctionOracle(differentiable, params, problem.rows)
    try:
        case.ask(problem, unequal(), oracle=oracle)
    except BackwardError:
        return Figure(what, 1)
    return Figure(what, _Trap.sprung)


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


# metamorphic


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


def sizes(family: Directions, params: Mapping[str, Tensor]) -> Tensor:
    """[d]: the size of a family's directions in each entry; 1 unless the family says otherwise."""
    sites = getattr(family, "sites", {})
    scale = {name: sites[name].scale if name in sites else 1.0 for name in params}
    return torch.cat([torch.full((v.numel(),), scale[n]).double() for n, v in params.items()])


@dataclass(frozen=True)
class _Span:
    """The distinct directions that an oracle was asked about.

    Args:
        measured: [directions, d].
        applied: [directions, d], as they enter a gradient: divided by their squared sizes.
        rows: which rows asked about each.
    """

    measured: Tensor
    applied: Tensor
    rows: list[set[int]]

    def slope_one(self, number: int) -> Tensor:
        """[d]: a gradient with slope 1 along that direction and 0 along all others."""
        return torch.linalg.pinv(self.measured)[:, number]

    def coefficients(self, grad: Tensor) -> Tensor:
        """[directions], of a gradient [d]."""
        return grad @ torch.linalg.pinv(self.applied)


def _span(answer: Answer) -> _Span:
    vectors, rows, size = [], [], torch.ones(())
    for asked in answer.oracle.asked:
        family, number = asked.directions, asked.direction
        if family is None or number is None:
            continue
        size = sizes(family, answer.oracle.params)
        vectors.append(flatten({name: family.dense(name, number) for name in answer.oracle.params}))
        rows.append(asked.row)
    if not vectors:
        raise NotApplicable("it asked for no directions")
    distinct, index = torch.unique(torch.cat(vectors), dim=0, return_inverse=True)
    users: list[set[int]] = [set() for _ in distinct]
    for number, row in zip(index.tolist(), torch.cat(rows).tolist(), strict=True):
        users[number].add(row)
    if len(distinct) > distinct.shape[1] or torch.linalg.matrix_rank(distinct) < len(distinct):
        raise NotApplicable("it asked for more directions than this problem can tell apart")
    return _Span(distinct, distinct / size**2, users)


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
    """A direction of slope one, for the row that asked about it, gets the coefficient
    1 / (rows * directions of that row), whatever a baseline does to the others.

    The losses are linear, with slopes made after the directions are known: along one of them the
    slope is one, along all others zero.
    """
    if case.estimator.traits.target == "biased":
        raise NotApplicable("its target is declared as biased")
    answer = case.ask(linear(), unequal())
    span, params = _span(answer), answer.oracle.params
    asked = [sum(row in users for users in span.rows) for row in range(3)]
    # As well as the span allows: what lies outside it is the finding of the check before.
    limit = case.rounding + 10 * max(_residual(answer, span).values())
    worst = 0.0
    for number, users in enumerate(span.rows):
        slopes = torch.zeros(3, span.measured.shape[1], dtype=torch.float64)
        slopes[sorted(users)] = span.slope_one(number)
        problem = Quadratic(params, slopes, torch.zeros(3, dtype=torch.float64))
        coefficient = float(span.coefficients(case.ask(problem, unequal()).flat)[number])
        weight = sum(1 / (3 * asked[row]) for row in users)
        worst = max(worst, abs(coefficient / weight - 1))
    return Figure("relative error of a coefficient", worst, limit)


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
