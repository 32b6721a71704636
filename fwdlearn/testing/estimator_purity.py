"""An estimate depends on its arguments, leaves nothing behind, and runs nothing backward."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fwdlearn.errors import BackwardError
from fwdlearn.keys import Key
from fwdlearn.oracle import SlopeOracle, forbid_backward
from fwdlearn.testing.estimator_case import ROOT, EstimatorCase, differing, quadratic, unequal
from fwdlearn.testing.oracles import Asked
from fwdlearn.testing.report import Figure, Suite, disturb, generator_states
from fwdlearn.testing.settings import fresh, settings_of

CHECKS: Suite[EstimatorCase] = Suite()
_check = CHECKS.check


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
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # Forward mode is allowed.
        return tangents[0].clone()

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
        oracle = type(oracle)(differentiable, params, problem.rows)
    try:
        case.ask(problem, unequal(), oracle=oracle)
    except BackwardError:
        return Figure(what, 1)
    return Figure(what, _Trap.sprung)
