"""Tests of the tests: for each check, something broken in that way, which must fail it.

Each entry lists the checks that must fail, and those that fail must be exactly these. Where a
fault shows in more than one check, a comment says why logic wants it so.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor

from fwdlearn.allocator import Allocator, Block, Plan
from fwdlearn.counts import divide
from fwdlearn.directions import Directions
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.factors import LowRank
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.oracle import LossOracle
from fwdlearn.testing import check_allocator, check_estimator
from fwdlearn.testing.allocator_checks import ALLOCATOR_CHECKS
from fwdlearn.testing.estimator_checks import ESTIMATOR_CHECKS

COSTS_ONE_PLUS_CLEAN = Traits(LossOracle, "weights", "smoothed", 1, 1)


@dataclass(frozen=True)
class Remembered(Directions):
    """Directions that are expanded once: all saboteurs ask for the same ones."""

    @cached_property
    def whole(self) -> dict[str, Any]:
        every = torch.arange(self.count)
        return {name: super(Remembered, self).factors(name, every) for name in self.params}

    def factors(self, name: str, ids: Tensor) -> LowRank | Tensor:
        whole = self.whole[name]
        if isinstance(whole, LowRank):
            return LowRank(whole.left[ids], whole.right[ids], whole.scale)
        return whole[ids]


Shapes = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@cache
def _family(key: Key, shapes: Shapes, count: int) -> Directions:
    params = {name: torch.zeros(shape, dtype=dtype) for name, shape, dtype in shapes}
    return Remembered(key, params, count)


def family(key: Key, params: Mapping[str, Tensor], count: int) -> Directions:
    shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in params.items())
    return _family(key, shapes, count)


@dataclass(frozen=True)
class Honest(Estimator):
    """One-sided differences against the clean loss, in steps that a saboteur can spoil."""

    sigma: float = 0.1

    traits = COSTS_ONE_PLUS_CLEAN

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        start = oracle.queries
        directions = self.directions(key, params, plan)
        number = self.numbers(plan)
        losses = oracle.losses(plan.row, directions, number, self.sigma).double()
        clean = oracle.losses(torch.arange(plan.rows)).double()
        valid = losses.isfinite() & clean[plan.row].isfinite()
        weight, dropped = self.weights(plan, valid)
        slopes = self.slopes(losses, clean, plan)
        slopes = torch.where(weight > 0, slopes, 0.0)
        coefficients = torch.zeros(plan.directions, dtype=torch.float64)
        coefficients.index_add_(0, number, weight * slopes)
        loss = self.loss(clean, valid, plan)
        norms = directions.square_norms(torch.arange(plan.directions))
        info = {
            "variance": (coefficients.square() * (norms - 1)).sum(),
            "nonfinite": torch.tensor(dropped),
        }
        grad = self.gradient(directions, coefficients, plan)
        return Estimate(grad, loss, oracle.queries - start, info), state

    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        return family(key, params, plan.directions)

    def numbers(self, plan: Plan) -> Tensor:
        return plan.direction

    def weights(self, plan: Plan, valid: Tensor) -> tuple[Tensor, int]:
        return plan.finite(valid)

    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        return (losses - clean[plan.row]) / self.sigma

    def loss(self, clean: Tensor, valid: Tensor, plan: Plan) -> Tensor:
        weight, _ = plan.finite(valid)
        return (weight * torch.where(valid, clean[plan.row], 0.0)).sum()

    def gradient(
        self, directions: Directions, coefficients: Tensor, plan: Plan
    ) -> Mapping[str, Tensor]:
        return DirectionGradient(directions, coefficients)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


def written(directions: Directions, coefficients: Tensor) -> dict[str, Tensor]:
    grad = DirectionGradient(directions, coefficients)
    return {name: grad[name] for name in grad}


# contract


@dataclass(frozen=True)
class ExtraName(Honest):
    def gradient(self, directions: Directions, coefficients: Tensor, plan: Plan) -> Any:
        return {**written(directions, coefficients), "extra": torch.zeros(())}


@dataclass(frozen=True)
class AlwaysDouble(Honest):
    def gradient(self, directions: Directions, coefficients: Tensor, plan: Plan) -> Any:
        return {n: v.double() for n, v in written(directions, coefficients).items()}


class _Once(dict[str, Tensor]):
    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        self[name] = torch.zeros_like(value)
        return value


@dataclass(frozen=True)
class FreedWhenRead(Honest):
    def gradient(self, directions: Directions, coefficients: Tensor, plan: Plan) -> Any:
        return _Once(written(directions, coefficients))


@dataclass(frozen=True)
class VectorInInfo(Honest):
    def estimate(self, *args: Any, **kwargs: Any) -> tuple[Estimate, Any]:
        estimate, state = super().estimate(*args, **kwargs)
        return replace(estimate, info={**estimate.info, "slopes": torch.zeros(3)}), state


@dataclass(frozen=True)
class HiddenFromRepr(Honest):
    sigma: float = field(default=0.1, repr=False)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(0.2)]


@dataclass(frozen=True)
class HoldsLambda(Honest):
    schedule: Any = None

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(schedule=lambda step: step)]


@dataclass
class Thawed(Estimator):
    sigma: float = 0.1

    traits = COSTS_ONE_PLUS_CLEAN

    def estimate(self, *args: Any, **kwargs: Any) -> tuple[Estimate, Any]:
        return Honest(self.sigma).estimate(*args, **kwargs)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


@dataclass(frozen=True)
class LeaveOneOutOfOne(Honest):
    """The mean of the other directions, of which there may be none."""

    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        slopes = super().slopes(losses, clean, plan)
        total = torch.zeros(plan.rows).double().index_add_(0, plan.row, slopes.nan_to_num())
        kept = torch.zeros(plan.rows).double().index_add_(0, plan.row, slopes.isfinite().double())
        return slopes - (total[plan.row] - slopes) / (kept[plan.row] - 1)


# purity


@dataclass(frozen=True)
class AddsAndSubtracts(Honest):
    """Perturbs in place and takes the perturbation off again, which rounds."""

    def estimate(self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan) -> Any:
        answer = super().estimate(oracle, params, state, key=key, plan=plan)
        steps = family(key, params, 1)
        for sign in (0.1, -0.1):
            for name, value in params.items():
                value.add_(sign * steps.dense(name, torch.tensor([0]))[0])
        return answer


@dataclass(frozen=True)
class RestoresUnlessError(Honest):
    """Restores exact bits, but not when the oracle raises."""

    def estimate(self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan) -> Any:
        kept = {name: value.clone() for name, value in params.items()}
        for value in params.values():
            value.mul_(1 + 1e-15)
        answer = super().estimate(oracle, params, state, key=key, plan=plan)
        for name, value in params.items():
            value.copy_(kept[name])
        return answer


@dataclass(frozen=True)
class CountsInSettings(Honest):
    calls: int = 0

    def estimate(self, *args: Any, **kwargs: Any) -> tuple[Estimate, Any]:
        object.__setattr__(self, "calls", self.calls + 1)
        return super().estimate(*args, **kwargs)


@dataclass(frozen=True)
class ReusesWeights(Honest):
    """Takes the plan's memory for its own."""

    def gradient(self, directions: Directions, coefficients: Tensor, plan: Plan) -> Any:
        plan.weight.mul_(2)
        return super().gradient(directions, coefficients, plan)


def also(key: Key, number: int) -> Key:
    """A key that depends on a number below eight too; few, so that they are remembered."""
    return Key(key.low, key.high ^ number)


@dataclass(frozen=True)
class TorchGlobal(Honest):
    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        return super().directions(also(key, int(torch.randint(8, ()))), params, plan)


@dataclass(frozen=True)
class NumpyGlobal(Honest):
    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        return super().directions(also(key, int(np.random.randint(8))), params, plan)


@dataclass(frozen=True)
class PythonGlobal(Honest):
    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        return super().directions(also(key, random.getrandbits(3)), params, plan)


@dataclass(frozen=True)
class ConsumesAndRestores(Honest):
    """Reads the global generator and puts its state back."""

    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        state = torch.get_rng_state()
        number = int(torch.randint(8, ()))
        torch.set_rng_state(state)
        return super().directions(also(key, number), params, plan)


@dataclass(frozen=True)
class SeedsAndRestores(Honest):
    """The result depends on the key alone and the state is put back: only the draw is seen."""

    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key.low)
            number = int(torch.randint(8, ()))
        return super().directions(also(key, number), params, plan)


@dataclass(frozen=True)
class CountsInSecret(Honest):
    """Not a setting, not state: a hidden counter on the object."""

    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        calls = self.__dict__.get("_calls", 0)
        object.__setattr__(self, "_calls", calls + 1)
        return super().directions(also(key, calls % 8), params, plan)


@dataclass(frozen=True)
class HalfKey(Honest):
    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        return super().directions(Key(key.low, 0), params, plan)


@dataclass(frozen=True)
class IgnoresKey(Honest):
    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        return super().directions(Key.root(0), params, plan)


@dataclass(frozen=True)
class AltersState(Honest):
    """Hands on the dictionary that it was given, with something else in it."""

    def init(self, params: Mapping[str, Tensor]) -> Any:
        return {"steps": 0}

    def estimate(self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan) -> Any:
        state["steps"] += 1
        return super().estimate(oracle, params, state, key=key, plan=plan)


@dataclass(frozen=True)
class StateIsIterator(Honest):
    """State that looks the same after pickling, but is not data."""

    def init(self, params: Mapping[str, Tensor]) -> Any:
        return (number for number in itertools.count())


# forward only


@dataclass(frozen=True)
class OwnBackward(Honest):
    """Differentiates something of its own."""

    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        with torch.enable_grad():
            leaf = torch.ones((), requires_grad=True)
            (leaf * 2).backward()
        return super().slopes(losses, clean, plan)


@dataclass(frozen=True)
class TriesBackward(Honest):
    """Differentiates the answers where it can, and says nothing where it cannot."""

    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        try:
            with torch.enable_grad():
                losses.sum().backward()
        except RuntimeError:
            pass
        return super().slopes(losses, clean, plan)


# accounting


@dataclass(frozen=True)
class ForgetsClean(Honest):
    def estimate(self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan) -> Any:
        estimate, state = super().estimate(oracle, params, state, key=key, plan=plan)
        return replace(estimate, queries=len(plan)), state


@dataclass(frozen=True)
class ReportsTotal(Honest):
    """What the oracle has counted since it was made, not since this call."""

    def estimate(self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan) -> Any:
        estimate, state = super().estimate(oracle, params, state, key=key, plan=plan)
        return replace(estimate, queries=oracle.queries), state


@dataclass(frozen=True)
class PromisesLess(Honest):
    traits = Traits(LossOracle, "weights", "smoothed", 1, 0)


# metamorphic


@dataclass(frozen=True)
class NoDivision(Honest):
    """Forgets to divide by sigma."""

    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        return losses - clean[plan.row]

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(1.0)]


@dataclass(frozen=True)
class HalfSigma(NoDivision):
    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(0.5)]


@dataclass(frozen=True)
class Clips(Honest):
    """A bound on slopes that only large losses meet."""

    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        return super().slopes(losses, clean, plan).clamp(-60, 60)


@dataclass(frozen=True)
class NoBaseline(Estimator):
    """Not called sigma, so that only the shift can see it."""

    width: float = 0.1

    traits = COSTS_ONE_PLUS_CLEAN

    def estimate(self, *args: Any, **kwargs: Any) -> tuple[Estimate, Any]:
        return _NoBaseline(self.width).estimate(*args, **kwargs)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


@dataclass(frozen=True)
class _NoBaseline(Honest):
    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        return losses / self.sigma


@dataclass(frozen=True)
class DriftingBaseline(Honest):
    """Subtracts a running mean of earlier losses: unbiased, and never up to date."""

    def init(self, params: Mapping[str, Tensor]) -> Any:
        return 0.0

    def estimate(self, oracle: Any, params: Any, state: Any, *, key: Key, plan: Plan) -> Any:
        spoiled = _Subtracts(self.sigma, state)
        estimate, _ = spoiled.estimate(oracle, params, None, key=key, plan=plan)
        return estimate, 0.9 * state + 0.1 * float(estimate.loss)


@dataclass(frozen=True)
class _Subtracts(Honest):
    baseline: float = 0.0

    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        return (losses - self.baseline) / self.sigma


@dataclass(frozen=True)
class OverwrittenBaseline(Honest):
    """The clean loss of the last row, for all."""

    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        return (losses - clean[-1]) / self.sigma


@dataclass(frozen=True)
class SumsSharedRows(Honest):
    """Forgets that rows that share directions are averaged too."""

    def weights(self, plan: Plan, valid: Tensor) -> tuple[Tensor, int]:
        weight, dropped = plan.finite(valid)
        return (weight * plan.rows if plan.sharing > 1 else weight), dropped


@dataclass(frozen=True)
class SumsDirections(Honest):
    """Forgets to divide by the number of directions: grows with them."""

    def weights(self, plan: Plan, valid: Tensor) -> tuple[Tensor, int]:
        weight, dropped = plan.finite(valid)
        return weight * plan.counts[plan.row], dropped


@dataclass(frozen=True)
class CountWeighted(Honest):
    """Every query counts the same, so rows with more of them count more."""

    def weights(self, plan: Plan, valid: Tensor) -> tuple[Tensor, int]:
        plan.finite(valid)
        return valid.double() / valid.sum(), int((~valid).sum())


@dataclass(frozen=True)
class OwnNumbers(Honest):
    """Numbers private directions itself."""

    def numbers(self, plan: Plan) -> Tensor:
        return torch.arange(len(plan)) if plan.sharing == 1 else plan.direction


@dataclass(frozen=True)
class LossOverQueries(Honest):
    def loss(self, clean: Tensor, valid: Tensor, plan: Plan) -> Tensor:
        return clean[plan.row][valid].mean()


@dataclass(frozen=True)
class ScalesOneTensor(Honest):
    """Applies another multiple of the direction in one tensor, by one part in a million."""

    def gradient(self, directions: Directions, coefficients: Tensor, plan: Plan) -> Any:
        grad = written(directions, coefficients)
        name = next(iter(grad))
        return {**grad, name: grad[name] * (1 + 1e-6)}


@dataclass(frozen=True)
class AnotherDirection(Honest):
    """Draws again for the update, with another key."""

    def gradient(self, directions: Directions, coefficients: Tensor, plan: Plan) -> Any:
        return DirectionGradient(replace(directions, key=directions.key.fold(1)), coefficients)


@dataclass(frozen=True)
class SlightlyTooLarge(Honest):
    """By one part in a million: too little to show in a mean."""

    def slopes(self, losses: Tensor, clean: Tensor, plan: Plan) -> Tensor:
        return super().slopes(losses, clean, plan) * (1 + 1e-6)


# statistical


@dataclass(frozen=True)
class _SameStream(Directions):
    """Parameters of the same shape get the same numbers."""

    def dense(self, name: str, ids: Tensor) -> Tensor:
        shape = self.params[name].shape
        first = next(other for other, value in self.params.items() if value.shape == shape)
        return super().dense(first, ids)


@dataclass(frozen=True)
class SharedSeeds(Honest):
    def directions(self, key: Key, params: Mapping[str, Tensor], plan: Plan) -> Directions:
        return _SameStream(key, params, plan.directions)

    def gradient(self, directions: Directions, coefficients: Tensor, plan: Plan) -> Any:
        ids = torch.arange(directions.count)
        return {
            name: torch.tensordot(coefficients.to(value.dtype), directions.dense(name, ids), 1)
            for name, value in directions.params.items()
        }


@dataclass(frozen=True)
class FirstDirectionOnly(Honest):
    """Spends every query of a row on its first direction."""

    def numbers(self, plan: Plan) -> Tensor:
        first = plan.counts.cumsum(0) - plan.counts
        return plan.direction[first][plan.row]


@dataclass(frozen=True)
class HalfVariance(Honest):
    def estimate(self, *args: Any, **kwargs: Any) -> tuple[Estimate, Any]:
        estimate, state = super().estimate(*args, **kwargs)
        info = {**estimate.info, "variance": estimate.info["variance"] / 2}
        return replace(estimate, info=info), state


# errors


@dataclass(frozen=True)
class ZeroesSilently(Honest):
    """Non-finite differences become zero and nobody is told, unless nothing is left."""

    def weights(self, plan: Plan, valid: Tensor) -> tuple[Tensor, int]:
        plan.finite(valid)
        return torch.where(valid, plan.weight, 0.0), 0


@dataclass(frozen=True)
class CountsButZeroes(Honest):
    """Tells, but the row that lost a direction counts less."""

    def weights(self, plan: Plan, valid: Tensor) -> tuple[Tensor, int]:
        _, dropped = plan.finite(valid)
        return torch.where(valid, plan.weight, 0.0), dropped


@dataclass(frozen=True)
class NeverRaises(Honest):
    def weights(self, plan: Plan, valid: Tensor) -> tuple[Tensor, int]:
        if not valid.any():
            return torch.zeros(len(plan)).double(), len(plan)
        return plan.finite(valid)

    def loss(self, clean: Tensor, valid: Tensor, plan: Plan) -> Tensor:
        return super().loss(clean, valid, plan) if valid.any() else clean.sum()


ESTIMATORS: Mapping[type[Estimator], set[str]] = {
    ExtraName: {"gradient_matches_parameters"},
    AlwaysDouble: {"gradient_matches_parameters"},
    FreedWhenRead: {"gradient_can_be_asked_twice"},
    VectorInInfo: {"scalars_are_scalars"},
    HiddenFromRepr: {"settings_survive"},
    HoldsLambda: {"settings_survive"},
    Thawed: {"settings_are_frozen"},
    LeaveOneOutOfOne: {"one_direction_works_or_is_refused"},
    AddsAndSubtracts: {"parameters_unchanged"},
    RestoresUnlessError: {"parameters_unchanged_after_error"},
    CountsInSettings: {"settings_unchanged"},
    ReusesWeights: {"plan_unchanged"},
    TorchGlobal: {"global_generators_untouched"},
    NumpyGlobal: {"global_generators_untouched"},
    PythonGlobal: {"global_generators_untouched"},
    ConsumesAndRestores: {"global_generators_untouched"},
    SeedsAndRestores: {"global_generators_untouched"},
    CountsInSecret: {"same_key_same_result"},
    HalfKey: {"other_key_other_result"},
    # All repeats are one and the same, so the mean is off and there is no variance to look at.
    IgnoresKey: {"other_key_other_result", "mean_is_target"},
    AltersState: {"state_survives"},
    StateIsIterator: {"state_survives"},
    OwnBackward: {"nothing_runs_backward"},
    TriesBackward: {"nothing_runs_backward"},
    ForgetsClean: {"queries_reported"},
    ReportsTotal: {"queries_reported"},
    PromisesLess: {"queries_promised"},
    # At sigma = 1 nothing but the comparison with 10 sigma can see it ...
    NoDivision: {"sigma_cancels_on_linear_loss"},
    # ... elsewhere every coefficient is wrong, and so is their mean.
    HalfSigma: {
        "sigma_cancels_on_linear_loss",
        "coefficients_are_weighted_slopes",
        "mean_is_target",
    },
    Clips: {"loss_scale_scales_gradient"},
    NoBaseline: {"loss_shift_changes_nothing"},
    # What remains of the loss is divided by sigma, so both sigma and a shift bring it to light.
    DriftingBaseline: {"loss_shift_changes_nothing", "sigma_cancels_on_linear_loss"},
    # A shift cancels. The difference between two rows stays, divided by sigma; it is another one
    # for another last row, and none for a row alone.
    OverwrittenBaseline: {
        "sigma_cancels_on_linear_loss",
        "row_order_changes_nothing",
        "uniform_plan_averages_rows",
    },
    SumsSharedRows: {"uniform_plan_averages_rows"},
    # Coefficients are too large by the count: each of them, their mean, and the more there are.
    # A row that lost a direction has a smaller count to be multiplied with.
    SumsDirections: {
        "coefficients_are_weighted_slopes",
        "mean_is_target",
        "variance_falls_with_directions",
        "nonfinite_losses_are_dropped",
    },
    # The weights of a plan make the mean one over rows: seen one by one and on average.
    CountWeighted: {"coefficients_are_weighted_slopes", "mean_is_target"},
    OwnNumbers: {"row_order_changes_nothing"},
    LossOverQueries: {"loss_is_mean_over_rows"},
    ScalesOneTensor: {"directions_measured_are_applied"},
    # A direction that was not measured knows nothing of the slope: its mean is zero.
    AnotherDirection: {"directions_measured_are_applied", "mean_is_target"},
    SlightlyTooLarge: {"coefficients_are_weighted_slopes"},
    SharedSeeds: {"mean_is_target"},
    FirstDirectionOnly: {"variance_falls_with_directions"},
    HalfVariance: {"variance_is_as_reported"},
    ZeroesSilently: {"nonfinite_losses_are_dropped"},
    CountsButZeroes: {"nonfinite_losses_are_dropped"},
    NeverRaises: {"nothing_finite_raises"},
}


def test_the_honest_one_passes() -> None:
    report = check_estimator(Honest)
    assert report.passed, str(report)
    assert all(result.status == "passed" for result in report.results), str(report)


@pytest.mark.parametrize("broken", ESTIMATORS, ids=lambda kind: kind.__name__)
def test_estimator_fails_exactly_its_checks(broken: type[Estimator]) -> None:
    report = check_estimator(broken)
    assert set(report.failed) == ESTIMATORS[broken], str(report)


def test_every_estimator_check_has_its_saboteur() -> None:
    assert set().union(*ESTIMATORS.values()) == set(ESTIMATOR_CHECKS.checks)


# allocators


@dataclass(frozen=True)
class ByLoss(Allocator):
    """One direction each, the rest in proportion to the loss by largest remainder; honest."""

    directions: int = 4

    signals = frozenset({"loss"})

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        return self.plan(self.counts(rows, self.shares(signals))), state

    def shares(self, signals: Mapping[str, Tensor]) -> Tensor:
        loss = signals["loss"].double()
        return loss / loss.sum() if loss.sum() > 0 else torch.ones_like(loss) / len(loss)

    def counts(self, rows: int, shares: Tensor) -> Tensor:
        wanted = rows * (self.directions - 1) * shares
        counts = wanted.floor().long()
        left = rows * (self.directions - 1) - int(counts.sum())
        counts[(wanted - counts).argsort(descending=True, stable=True)[:left]] += 1
        return counts + 1

    def plan(self, counts: Tensor) -> Plan:
        return Plan(counts)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


@dataclass(frozen=True)
class _Short(Plan):
    def __post_init__(self) -> None:
        plan = Plan(self.counts.long())
        self.__dict__.update(row=plan.row, direction=plan.direction, weight=plan.weight)


@dataclass(frozen=True)
class ShortCounts(ByLoss):
    def plan(self, counts: Tensor) -> Plan:
        return _Short(counts.int())


@dataclass(frozen=True)
class OneTooMany(ByLoss):
    def counts(self, rows: int, shares: Tensor) -> Tensor:
        counts = super().counts(rows, shares)
        counts[0] += 1
        return counts


@dataclass(frozen=True)
class _EverySecond(Plan):
    def __post_init__(self) -> None:
        self.__dict__["direction"] = 2 * Plan(self.counts).direction


@dataclass(frozen=True)
class LeavesGaps(ByLoss):
    def plan(self, counts: Tensor) -> Plan:
        return _EverySecond(counts)


@dataclass(frozen=True)
class _CountWeighted(Plan):
    def __post_init__(self) -> None:
        self.__dict__["weight"] = torch.ones(len(self)).double() / len(self)


@dataclass(frozen=True)
class WeighsByCount(ByLoss):
    def plan(self, counts: Tensor) -> Plan:
        return _CountWeighted(counts)


@dataclass(frozen=True)
class AllocatorHiddenFromRepr(ByLoss):
    directions: int = field(default=3, repr=False)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(5)]


@dataclass
class AllocatorThawed(Allocator):
    directions: int = 4

    signals = frozenset({"loss"})

    def allocate(self, rows: int, signals: Any, state: Any, *, key: Key) -> tuple[Plan, Any]:
        return ByLoss(self.directions).allocate(rows, signals, state, key=key)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


@dataclass(frozen=True)
class PeeksAtGradient(ByLoss):
    def shares(self, signals: Mapping[str, Tensor]) -> Tensor:
        return super().shares({"loss": signals["loss"] * signals["gradient_norm"]})


@dataclass(frozen=True)
class AllocatorCountsInSettings(ByLoss):
    calls: int = 0

    def allocate(self, *args: Any, **kwargs: Any) -> tuple[Plan, Any]:
        object.__setattr__(self, "calls", self.calls + 1)
        return super().allocate(*args, **kwargs)


@dataclass(frozen=True)
class NormalisesInPlace(ByLoss):
    def shares(self, signals: Mapping[str, Tensor]) -> Tensor:
        shares = super().shares(signals)
        signals["loss"].copy_(shares)
        return shares


@dataclass(frozen=True)
class ShufflesGlobally(ByLoss):
    def shares(self, signals: Mapping[str, Tensor]) -> Tensor:
        shares = super().shares(signals)
        return shares[torch.randperm(len(shares))]


@dataclass(frozen=True)
class AllocatorCountsInSecret(ByLoss):
    def shares(self, signals: Mapping[str, Tensor]) -> Tensor:
        calls = self.__dict__.get("_calls", 0)
        object.__setattr__(self, "_calls", calls + 1)
        return super().shares(signals).roll(calls)


@dataclass(frozen=True)
class AllocatorAltersState(ByLoss):
    def init(self) -> Any:
        return {"steps": 0}

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        state["steps"] += 1
        return super().allocate(rows, signals, state, key=key)


@dataclass(frozen=True)
class DividesByNothing(ByLoss):
    def shares(self, signals: Mapping[str, Tensor]) -> Tensor:
        return signals["loss"] / signals["loss"].sum()


@dataclass(frozen=True)
class DrawsForNothing(ByLoss):
    """Every second row goes without, by chance, and the others do not make up for it."""

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        drawn = key.uniform(rows) < 0.5
        drawn[int(key.fold("one").permutation(rows)[0])] = True
        counts = torch.zeros(rows, dtype=torch.int64)
        counts[drawn] = divide(torch.ones(int(drawn.sum())), rows * self.directions)
        return Plan.included(counts, torch.ones(rows).double()), state


@dataclass(frozen=True)
class BlockAtFullPrice(ByLoss):
    """One of two blocks is drawn, and says that it was certain."""

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        block = Block(("w", "*"), int(key.uniform(1)[0] < 0.5), 1.0)
        return Plan(torch.full((rows,), self.directions), block=block), state


ALLOCATORS: Mapping[type[Allocator], set[str]] = {
    ShortCounts: {"counts_are_whole_and_positive"},
    OneTooMany: {"counts_sum_to_budget", "odd_signals_give_a_plan"},
    LeavesGaps: {"directions_have_no_gaps"},
    # Weights are the only way in which a plan can move the mean.
    WeighsByCount: {"weights_follow_counts", "mean_is_unchanged"},
    DrawsForNothing: {"mean_is_unchanged"},
    BlockAtFullPrice: {"mean_is_unchanged"},
    AllocatorHiddenFromRepr: {"settings_survive"},
    AllocatorThawed: {"settings_are_frozen"},
    PeeksAtGradient: {"only_declared_signals_are_read"},
    AllocatorCountsInSettings: {"settings_unchanged"},
    NormalisesInPlace: {"signals_unchanged"},
    ShufflesGlobally: {"global_generators_untouched"},
    AllocatorCountsInSecret: {"same_key_same_plan"},
    AllocatorAltersState: {"state_survives"},
    DividesByNothing: {"odd_signals_give_a_plan"},
}


def test_the_honest_allocator_passes() -> None:
    report = check_allocator(ByLoss)
    assert all(result.status == "passed" for result in report.results), str(report)


@pytest.mark.parametrize("broken", ALLOCATORS, ids=lambda kind: kind.__name__)
def test_allocator_fails_exactly_its_checks(broken: type[Allocator]) -> None:
    report = check_allocator(broken)
    assert set(report.failed) == ALLOCATORS[broken], str(report)


def test_every_allocator_check_has_its_saboteur() -> None:
    assert set().union(*ALLOCATORS.values()) == set(ALLOCATOR_CHECKS.checks)
