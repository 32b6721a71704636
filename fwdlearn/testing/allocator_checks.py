"""What every allocator must keep, one small function each.

Signals come from a mapping that answers to every name and remembers which ones were read, so that
a fault shows in the check that looks for it and not in all of them.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fwdlearn.allocator import Allocator, Feedback, Plan
from fwdlearn.directions import Directions
from fwdlearn.keys import Key
from fwdlearn.testing.estimator_case import ROOT
from fwdlearn.testing.estimator_purity import GlobalDraws, plain
from fwdlearn.testing.estimator_statistics import mean_figure
from fwdlearn.testing.problems import Linear, flatten, numbers, unflatten
from fwdlearn.testing.report import Figure, NotApplicable, Suite, disturb, generator_states
from fwdlearn.testing.settings import fresh, frozen_figure, settings_of, survival_figure

BATCHES = (7, 1, 2, 64, 3)
MEAN_REPEATS = 300
# The fewer numbers there are, the less a gradient along random directions varies.
FEW = {"w": (2,), "bias": ()}
# Of these signals, whole numbers below the number of rows.
WHOLE = ("example", "target")


class Signals(Mapping[str, Tensor]):
    """Positive float64 [rows] for every name, int64 for `WHOLE`; remembers what was read."""

    def __init__(self, rows: int, key: Key, make: Callable[[Tensor], Tensor] | None = None) -> None:
        self.read: set[str] = set()
        self._rows, self._key, self._make = rows, key, make
        self._given: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        if name not in self._given:
            values = numbers(self._key.fold(name), self._rows).square() + 0.01
            if name in WHOLE:
                self._given[name] = (100 * values).long() % self._rows
            else:
                self._given[name] = values if self._make is None else self._make(values)
        return self._given[name]

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


@dataclass
class AllocatorCase:
    """An allocator under test."""

    allocator: Allocator

    def ask(
        self,
        rows: int,
        key: Key = ROOT,
        *,
        allocator: Allocator | None = None,
        signals: Signals | None = None,
        **state: Any,
    ) -> tuple[Plan, Any]:
        """The plan of one step, and the state after it, from an odd state of the global
        generators."""
        disturb()
        allocator = fresh(self.allocator) if allocator is None else allocator
        signals = Signals(rows, key.fold("signals")) if signals is None else signals
        before = state["state"] if "state" in state else allocator.init()
        plan, after = allocator.allocate(rows, signals, before, key=key)
        after = allocator.observe(plan, signals, _feedback(plan, key), after)
        return plan, after


def _feedback(plan: Plan, key: Key, square_slope: Tensor | None = None) -> Feedback:
    """Of a step that went well; a row without directions tells nothing."""
    slopes = numbers(key.fold("slopes"), plan.rows).square() + 0.01
    slopes = slopes if square_slope is None else square_slope
    rows = {"square_slope": torch.where(plan.counts > 0, slopes, torch.nan)}
    square, noise = (float(value) for value in numbers(key.fold("norms"), 2).square() + 0.01)
    return Feedback(1.0, square + noise, {"w": square, "bias": noise}, noise, rows)


ALLOCATOR_CHECKS: Suite[AllocatorCase] = Suite()
_check = ALLOCATOR_CHECKS.check


def _steps(case: AllocatorCase) -> Iterator[tuple[int, Plan, int]]:
    """Plans of batches of several sizes and the budgets that were announced for them, with the
    state going from one to the next."""
    allocator = fresh(case.allocator)
    state = allocator.init()
    for step, rows in enumerate(BATCHES):
        budget = allocator.budget(rows, state)
        plan, state = case.ask(rows, ROOT.fold(step), allocator=allocator, state=state)
        yield rows, plan, budget


def _differing(left: Plan, right: Plan) -> int:
    names = ("counts", "row", "direction", "weight")
    return sum(not torch.equal(getattr(left, name), getattr(right, name)) for name in names)


# contract


@_check("contract")
def counts_are_whole_and_positive(case: AllocatorCase) -> Figure:
    """int64, one count a row, at least 1, for batches of every size; 0 only where rows are drawn
    and the plan says with what weight."""
    wrong = 0
    for rows, plan, _ in _steps(case):
        counts, least = plan.counts, int(plan.row_weight is None)
        wrong += counts.dtype != torch.int64 or counts.shape != (rows,) or int(counts.min()) < least
    return Figure("plans of another form:", wrong)


@_check("contract")
def counts_sum_to_budget(case: AllocatorCase) -> Figure:
    """The counts of a plan sum to the announced budget exactly; that of the first step is rows *
    directions."""
    worst, first = 0, fresh(case.allocator)
    for rows, plan, budget in _steps(case):
        worst = max(worst, abs(int(plan.counts.sum()) - budget))
        whole = rows * case.allocator.directions
        worst = max(worst, abs(first.budget(rows, first.init()) - whole))
    return Figure("directions beyond or below the budget:", worst)


@_check("contract")
def directions_have_no_gaps(case: AllocatorCase) -> Figure:
    """The directions are 0, ..., `plan.directions` - 1, and no row gets one of them twice."""
    wrong = 0
    for _, plan, _ in _steps(case):
        wrong += plan.direction.unique().tolist() != list(range(plan.directions))
        pairs = torch.stack((plan.row, plan.direction), 1)
        wrong += len(pairs.unique(dim=0)) != len(pairs)
    return Figure("plans with gaps or repetitions:", wrong)


@_check("contract")
def weights_follow_counts(case: AllocatorCase) -> Figure:
    """Weights are 1 / (rows * count of the row), so they sum to 1. A row that was drawn by chance
    may weigh more, and one that says that it re-weighs as it likes."""
    worst = 0.0
    for rows, plan, _ in _steps(case):
        count = torch.bincount(plan.row, minlength=rows)
        exact = 1 / (rows * count[plan.row].double())
        if plan.row_weight is None:
            worst = max(worst, float((plan.weight / exact - 1).abs().max()))
        elif not case.allocator.reweights:
            worst = max(worst, float((1 - plan.weight / exact).max()))
        if plan.row_weight is None or case.allocator.reweights:
            worst = max(worst, abs(float(plan.weight.sum()) - 1))
    return Figure("relative error of a weight", worst, 1e-12)


@_check("contract")
def settings_survive(case: AllocatorCase) -> Figure:
    """eval(repr), pickle and dataclasses.replace give an equal object."""
    return survival_figure(case.allocator)


@_check("contract")
def settings_are_frozen(case: AllocatorCase) -> Figure:
    """The class is a frozen dataclass."""
    return frozen_figure(case.allocator)


@_check("contract")
def only_declared_signals_are_read(case: AllocatorCase) -> Figure:
    """It reads no signal that `signals` does not name."""
    allocator, read = fresh(case.allocator), set()
    state = allocator.init()
    for step, rows in enumerate(BATCHES):
        signals = Signals(rows, ROOT.fold(step))
        key = ROOT.fold(step)
        _, state = case.ask(rows, key, allocator=allocator, signals=signals, state=state)
        read |= signals.read
    extra = sorted(read - set(case.allocator.signals))
    return Figure(" ".join(["signals read but not declared:", *extra]), len(extra))


# purity


@_check("purity")
def settings_unchanged(case: AllocatorCase) -> Figure:
    """Allocating leaves the settings as they were."""
    allocator = fresh(case.allocator)
    before = settings_of(allocator)
    case.ask(7, allocator=allocator)
    after = settings_of(allocator)
    return Figure("settings that changed:", sum(before[name] != after[name] for name in before))


@_check("purity")
def signals_unchanged(case: AllocatorCase) -> Figure:
    """Allocating leaves the signals as they were."""
    signals, same = Signals(7, ROOT), Signals(7, ROOT)
    case.ask(7, signals=signals)
    changed = sum(not torch.equal(signals[name], same[name]) for name in sorted(signals.read))
    return Figure("signals that changed:", changed)


@_check("purity")
def global_generators_untouched(case: AllocatorCase) -> Figure:
    """torch's, numpy's and Python's generators are neither moved, nor read, nor restored."""
    moved, plans = 0, []
    with GlobalDraws() as draws:
        for number in (11, 12):
            allocator, signals = fresh(case.allocator), Signals(7, ROOT)
            disturb(number)
            before = generator_states()
            plans.append(allocator.allocate(7, signals, allocator.init(), key=ROOT)[0])
            moved += generator_states() != before
    return Figure("signs of use:", moved + draws.count + _differing(*plans))


@_check("purity")
def same_key_same_plan(case: AllocatorCase) -> Figure:
    """The same key gives the same plan: from a new object, and from one that has been used."""
    allocator = fresh(case.allocator)
    first, _ = case.ask(7)
    changed = _differing(first, case.ask(7)[0])
    for key in (ROOT, ROOT.fold(1), ROOT):
        plan, _ = case.ask(7, key, allocator=allocator, signals=Signals(7, ROOT.fold("signals")))
        if key == ROOT:
            changed += _differing(first, plan)
    return Figure("tensors that changed:", changed)


@_check("purity")
def state_survives(case: AllocatorCase) -> Figure:
    """State is data: pickled and restored it gives the same next plan, and no step alters it."""
    lost = 0
    _, state = case.ask(7)
    for step in range(1, 3):
        before = copy.deepcopy(state)
        restored = pickle.loads(pickle.dumps(state))
        answers = [case.ask(7, ROOT.fold(step), state=kept) for kept in (state, restored)]
        lost += _differing(answers[0][0], answers[1][0])
        lost += pickle.dumps(plain(before)) != pickle.dumps(plain(state))
        state = answers[0][1]
    return Figure("tensors that differ after restoring, and states altered:", lost)


# statistical


@_check("statistical")
def mean_is_unchanged(case: AllocatorCase) -> Figure:
    """The mean of an estimate under its plans is the gradient of the mean loss: z-test on a linear
    loss whose rows disagree, with exact slopes, and signals that tell how large each row's is. One
    that re-weighs is held to the weights of its plans."""
    rows = 5
    problem = Linear.random(ROOT.fold("allocated"), rows, FEW)
    slopes = flatten(problem.gradients()) * (1 + torch.arange(rows).double()).unsqueeze(1)
    allocator = fresh(case.allocator)
    state, grads = allocator.init(), []
    for repeat in range(MEAN_REPEATS):
        # Keys that differ are independent; counting is quicker than folding.
        signals_key, plan_key, key = (Key(3 * repeat + part, ROOT.high) for part in range(3))
        signals = Signals(rows, signals_key, lambda values: values * slopes.norm(dim=1))
        plan, state = allocator.allocate(rows, signals, state, key=plan_key)
        family = Directions(key, problem.params, plan.directions)
        dense = {name: family.dense(name, plan.direction) for name in problem.params}
        if plan.block is not None:
            drawn = plan.block.names(problem.params)
            dense = {name: value * (name in drawn) for name, value in dense.items()}
        z = flatten(dense)
        along = (slopes[plan.row] * z).sum(1)
        grad = (plan.weight * along) @ z
        if plan.block is not None:
            # Zeros where the step is not about a parameter.
            parts = unflatten(grad.unsqueeze(0), problem.params)
            grad = flatten({n: part * plan.block.factor(n) for n, part in parts.items()})[0]
        if allocator.reweights and plan.row_weight is not None:
            grad = grad - plan.row_weight @ slopes + slopes.mean(0)
        grads.append(grad)
        square = torch.zeros(rows).double().index_add(0, plan.row, along.square())
        told = _feedback(plan, key, square / plan.counts)
        told = replace(told, square_norm=float(grad.square().sum()))
        state = allocator.observe(plan, signals, told, state)
    return mean_figure(torch.stack(grads), slopes.mean(0))


# errors


@_check("errors")
def odd_signals_give_a_plan(case: AllocatorCase) -> Figure:
    """Signals that are all zero, all equal, or zero but for one huge entry, give a plan whose
    counts are positive and sum to the budget."""
    if not case.allocator.signals:
        raise NotApplicable("it reads no signals")

    def single(values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_fill_(0, torch.tensor([1]), 1e30)

    wrong = 0
    for make in (torch.zeros_like, torch.ones_like, single):
        plan, _ = case.ask(7, signals=Signals(7, ROOT, make))
        wrong += int(plan.counts.sum()) != 7 * case.allocator.directions
    return Figure("plans beyond or below the budget:", wrong)
