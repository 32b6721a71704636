"""What an estimator must keep on average: z-tests, after the exact checks.

Rules. The numbers of repeats below are fixed in advance and the seed was chosen once. A test over
many coordinates is corrected for their number (Bonferroni). Each check raises a false alarm with
probability `FALSE_ALARM` at most, as far as the central limit theorem reaches. Every repeat has
its own key, a state goes from repeat to repeat as in training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.keys import Key
from fwdlearn.noise import Noise, SiteNoise
from fwdlearn.testing.estimator_case import ROOT, EstimatorCase, applied, measured
from fwdlearn.testing.problems import Linear, Logistic, Problem, Quadratic, flatten, unflatten
from fwdlearn.testing.report import Figure, NotApplicable, Suite
from fwdlearn.testing.settings import fresh

FALSE_ALARM = 1e-6
MEAN_REPEATS = 160
VARIANCE_REPEATS = 120
TARGET_SAMPLES = 2**14
# Few numbers, so that the mean stands out; two matrices of one shape, so that shared numbers show.
SMALL = {"w": (3, 2), "bias": (2,), "head": (3, 2)}
# Many numbers, so that a relative bias of order 1 / (their number) is small; few tensors.
WIDE = {"w": (6, 6), "bias": (8,)}

CHECKS: Suite[EstimatorCase] = Suite()
_check = CHECKS.check


def z_limit(comparisons: int, repeats: int) -> float:
    """The size that the largest of `comparisons` t-values exceeds with probability FALSE_ALARM."""
    return -float(stdtrit(repeats - 1, FALSE_ALARM / (2 * comparisons)))


@dataclass(frozen=True)
class Sample:
    """Independent estimates of one gradient.

    Args:
        grads: [repeats, d].
        variance: [repeats] as reported, or None.
        families: the directions or the noise of the last repeat, one for each set of parameters.
        scale: their largest size.
        learnt: whether a state went from one to the next.
    """

    grads: Tensor
    variance: Tensor | None
    families: tuple[Directions | Noise, ...]
    scale: float
    learnt: bool

    def square_errors(self) -> Tensor:
        """[repeats]: their mean estimates the trace of the covariance without bias."""
        repeats = len(self.grads)
        spread = (self.grads - self.grads.mean(0)).square().sum(1)
        return spread * repeats / (repeats - 1)


def draw(case: EstimatorCase, problem: Problem, plan: Plan, repeats: int, key: Key) -> Sample:
    """`repeats` estimates, one after the other."""
    estimator = fresh(case.estimator)
    grads, variance, state = [], [], estimator.init(problem.params)
    for repeat in range(repeats):
        # Keys that differ are independent; counting is quicker than folding.
        own = Key((key.low + repeat) % 2**32, key.high)
        answer = case.ask_on(problem, plan, own, estimator, state=state)
        state = answer.state
        grads.append(answer.flat)
        if "variance" in answer.estimate.info:
            variance.append(answer.estimate.info["variance"].double())
    families, scale = {}, 0.0
    for block in answer.oracle.asked:
        if block.directions is not None:
            families[_names(block.directions)] = block.directions
            scale = max(scale, float(block.scale.abs().max()))
    return Sample(
        torch.stack(grads),
        torch.stack(variance) if variance else None,
        tuple(families.values()),
        scale,
        state is not None,
    )


def _names(family: Directions | Noise) -> tuple[str, ...]:
    return family.names if isinstance(family, Noise) else tuple(family.params)


def mean_figure(
    sample: Tensor, target: Tensor, error: Tensor | float = 0.0, tests: int = 1
) -> Figure:
    """The largest |z| over coordinates of mean - target.

    Args:
        sample: [repeats, d].
        target: [d].
        error: [d], standard error of the target.
        tests: how many of these share one false-alarm rate.
    """
    repeats, size = sample.shape
    # Rounding, where an estimator happens to be exact.
    floor = 1e-9 * (1 + target.abs())
    deviation = (sample.var(0) / repeats + error**2 + floor**2).sqrt()
    z = (sample.mean(0) - target).abs() / deviation
    return Figure(f"largest |z| of {size}", float(z.max()), z_limit(tests * size, repeats))


def smoothed_gradient(
    problem: Problem, family: Directions | SiteNoise, sigma: float, key: Key
) -> tuple[Tensor, Tensor]:
    """E (L(params + sigma z) - L(params)) / sigma z / s^2 by sampling, with its standard error.

    s is the size of z in each entry; noise has its score in the place of the second z, and leaves
    alone the layers that it does not name. Independent of any estimator: it draws from the law of
    `family` under another key, and takes the linear part exactly, which leaves little noise.

    Returns:
        float64 [d] and [d].
    """
    sampler = dataclasses.replace(family, key=key, count=TARGET_SAMPLES)
    numbers = torch.arange(TARGET_SAMPLES)
    z = measured(sampler, numbers, problem.params)
    steps, exact = unflatten(z, problem.params), _flat(problem.gradient())
    moved = {name: value + sigma * steps[name] for name, value in problem.params.items()}
    clean, slopes = problem.clean_losses(), z @ exact
    losses = torch.zeros(TARGET_SAMPLES, dtype=torch.float64)
    for row in range(problem.rows):
        at = problem.losses(moved, torch.full((TARGET_SAMPLES,), row))
        losses += (at - clean[row]) / problem.rows
    rest = (losses / sigma - slopes).unsqueeze(1) * applied(sampler, numbers, problem.params)
    return exact + rest.mean(0), rest.std(0) / math.sqrt(TARGET_SAMPLES)


def _flat(gradient: Mapping[str, Tensor]) -> Tensor:
    return flatten({name: value.unsqueeze(0) for name, value in gradient.items()})[0]


def _larger(one: Figure, other: Figure) -> Figure:
    return max(one, other, key=lambda figure: figure.value / figure.limit)


@_check("statistical")
def mean_is_target(case: EstimatorCase) -> Figure:
    """Under very unequal counts the mean is the gradient: exactly on a quadratic, where symmetric
    noise leaves no trace; on a logistic loss the smoothed one where that is the target."""
    target = case.estimator.traits.target
    if target == "biased":
        raise NotApplicable("its target is declared as biased")
    plan = Plan(torch.tensor([2, 9, 3, 4]))
    problem: Problem = Quadratic.random(ROOT.fold("mean"), 4, SMALL)
    sample = draw(case, problem, plan, MEAN_REPEATS, ROOT.fold("on quadratic"))
    figure = mean_figure(sample.grads, _flat(problem.gradient()), tests=2)

    problem = Logistic.random(ROOT.fold("mean"), 4, SMALL)
    sample = draw(case, problem, plan, MEAN_REPEATS, ROOT.fold("on logistic"))
    exact = _flat(problem.gradient())
    if target == "gradient":
        return _larger(figure, mean_figure(sample.grads, exact, tests=2))
    sigma = float(getattr(case.estimator, "sigma", sample.scale))
    named = [name for family in sample.families for name in _names(family)]
    if not sigma or not named or len(set(named)) < len(named):
        return figure
    mean, square_error = exact.clone(), torch.zeros_like(exact)
    for family in sample.families:
        if not isinstance(family, (Directions, SiteNoise)):
            return figure
        smoothed, error = smoothed_gradient(problem, family, sigma, ROOT.fold("target"))
        mean += smoothed - exact
        square_error += error.square()
    return _larger(figure, mean_figure(sample.grads, mean, square_error.sqrt(), tests=2))


def _spread(case: EstimatorCase, directions: int) -> Sample:
    """Estimates of a linear loss of two rows, kept for the checks that look at their variance."""
    name = f"spread {directions}"
    if name not in case.shared:
        problem = Linear.random(ROOT.fold("spread"), 2, WIDE)
        plan = Plan.uniform(2, directions)
        case.shared[name] = draw(case, problem, plan, VARIANCE_REPEATS, ROOT.fold(name))
    sample: Sample = case.shared[name]
    if not sample.square_errors().mean() > 1e-18:
        raise NotApplicable("its estimates do not vary")
    return sample


@_check("statistical")
def variance_falls_with_directions(case: EstimatorCase) -> Figure:
    """Four times the directions give a quarter of the variance (a fifth, where a mean over the
    other directions is subtracted), or less where a state carries knowledge on."""
    if case.estimator.traits.target == "biased":
        raise NotApplicable("its target is declared as biased")
    few, many = _spread(case, 4).square_errors(), _spread(case, 16).square_errors()
    ratio = float(16 * many.mean() / (4 * few.mean()))
    # In logarithms, where relative errors add.
    error = math.sqrt(sum(float((q.std() / q.mean()) ** 2 / len(q)) for q in (few, many)))
    lowest = 0.0 if _spread(case, 4).learnt else (16 / 15) / (4 / 3)
    below = math.log(lowest / ratio) if lowest else 0.0
    outside = max(below, math.log(ratio), 0.0)
    return Figure(
        f"16 Var(16) / (4 Var(4)) = {ratio:.2f}; |z| outside [{lowest:.2f}, 1]:",
        outside / error,
        z_limit(1, VARIANCE_REPEATS),
    )


@_check("statistical")
def variance_is_as_reported(case: EstimatorCase) -> Figure:
    """info["variance"] is the trace of the covariance, but for a relative bias of at most
    2 / (number of parameters), which cheap formulas have."""
    sample = _spread(case, 4)
    if sample.variance is None:
        raise NotApplicable('it reports no info["variance"]')
    observed = sample.square_errors()
    difference = (sample.variance - observed) / observed.mean()
    error = float(difference.std()) / math.sqrt(len(difference))
    allowed = 2 / sample.grads.shape[1] + z_limit(1, VARIANCE_REPEATS) * error
    return Figure("relative error", abs(float(difference.mean())), allowed)
