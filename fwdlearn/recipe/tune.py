"""Finding the cliff: which sigma an estimator can use, and the largest learning rate that learns.

Sigma: estimates of one batch along the same directions, at sizes a factor of about three apart.
Where sigma is too small, rounding makes neighbours differ; where it is too large, curvature does.
In between they agree, and there a sigma is right whatever it is. Learning rates: short runs from
the same weights, over the same rows and with the same random numbers, so that little but the rate
tells them apart.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fwdlearn.errors import NonFiniteError, UsageError
from fwdlearn.recipe.build import assemble, load_parts
from fwdlearn.recipe.load import Recipe, load_recipe
from fwdlearn.trainer import Trainer

SIGMAS, RATES = 9, (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
# Neighbours that differ by more agree about nothing: a loss with steps, or noise alone.
_AGREE = 0.5
# What curvature may change of an estimate whose noise is many times itself.
_CLOSE = 0.05
_SHORTEST, _LONGEST = 10, 200


@dataclass(frozen=True)
class Sigma:
    """An estimate at a sigma.

    Args:
        value: of sigma.
        apart: the relative distance from the estimate at the next one, the smaller of the two
            sides' larger; infinite where an estimate failed.
    """

    value: float
    apart: float


@dataclass(frozen=True)
class Rate:
    """A short run.

    Args:
        value: of the learning rate.
        loss: mean training loss of its last third; infinite where it diverged.
    """

    value: float
    loss: float


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Args:
        sigmas: what was tried, ascending; empty where the estimator has no sigma.
        rates: likewise.
        steps: of each short run.
        words: what to add to the command line: the settings that came out best.
    """

    sigmas: tuple[Sigma, ...]
    rates: tuple[Rate, ...]
    steps: int
    words: tuple[str, ...]


class Losses:
    """A sink that keeps the training losses."""

    def __init__(self) -> None:
        self.kept: list[float] = []

    def start(self, meta: Mapping[str, Any]) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None:
        if "train.loss" in record:
            self.kept.append(float(record["train.loss"]))

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class Probe:
    """Trainers of one recipe that share its data and start from the same weights.

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: as `load_recipe` takes them.
    """

    def __init__(self, recipe: str, overrides: Sequence[str]) -> None:
        # A run that is cut short must not have its rate on the way down yet.
        self.recipe, self.words = recipe, [*overrides]
        self.whole = load_recipe(recipe, overrides)
        if "optimizer.schedule" in self.whole.components:
            self.words.append("~optimizer.schedule")
        given = self.whole.source.data.get("trainer") or {}
        removed = [name for name in ("queries", "evaluate_every") if name in given]
        self.words += [*(f"~trainer.{name}" for name in removed), "trainer.steps=1"]
        data, self.built = load_parts(self.whole)
        self.data = dataclasses.replace(data, evaluation=None)

    def trainer(self, *words: str, sink: Losses | None = None) -> Trainer:
        checked: Recipe = load_recipe(self.recipe, [*self.words, *words])
        built = dataclasses.replace(self.built, module=copy.deepcopy(self.built.module))
        return assemble(checked, [sink] if sink else [], (self.data, built)).trainer


def tune(recipe: str, overrides: Sequence[str] = (), seconds: float = 120.0) -> Tuned:
    """Probes sigma, then the learning rate with the sigma that was found.

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: `key=value` to set before.
        seconds: what the short runs may take together, positive, about.

    Raises:
        UsageError: the optimizer has no learning rate, or every rate diverges.
    """
    probe = Probe(recipe, overrides)
    optimizer = probe.whole.components["optimizer"]
    if "lr" not in optimizer.settings:
        raise UsageError(
            f"fwdlearn tune sets the learning rate, and {optimizer.name} has none; choose another "
            "optimizer, or set it by hand."
        )
    sigmas = tuple(_sigmas(probe))
    words = []
    least = min((one.apart for one in sigmas), default=math.inf)
    if least <= _AGREE:
        # The largest of those that agree is the furthest from rounding.
        limit = max(_CLOSE, 2 * least)
        best = max(one.value for one in sigmas if one.apart <= limit)
        words.append(f"estimator.sigma={best:.3g}")
    steps = _steps(probe, words, seconds)
    rates = _rates(probe, words, float(optimizer.settings["lr"]), steps)
    best_rate = min(rates, key=lambda one: one.loss)
    if math.isinf(best_rate.loss):
        raise UsageError(
            f"every learning rate from {rates[0].value:.1e} to {rates[-1].value:.1e} diverges; "
            "begin with a smaller optimizer.lr."
        )
    return Tuned(sigmas, rates, steps, (*words, f"optimizer.lr={best_rate.value:.3g}"))


def _sigmas(probe: Probe) -> Iterator[Sigma]:
    trainer = probe.trainer()
    usual = getattr(trainer.estimator, "sigma", None)
    if usual is None:
        return
    values = [usual * 10 ** ((n - SIGMAS // 2) / 2) for n in range(SIGMAS)]
    gaps, last = [], None
    for value in values:
        estimator: Any = trainer.estimator
        trainer.estimator = dataclasses.replace(estimator, sigma=value)
        try:
            found = {name: one.clone() for name, one in trainer.estimate().grad.items()}
        except NonFiniteError:
            found = None
        if value != values[0]:
            gaps.append(_apart(last, found))
        last = found
    for number, value in enumerate(values):
        sides = gaps[max(0, number - 1) : number + 1]
        yield Sigma(value, max(sides) if 0 < number < len(values) - 1 else math.inf)


def _apart(one: Mapping[str, Tensor] | None, other: Mapping[str, Tensor] | None) -> float:
    if one is None or other is None:
        return math.inf
    distance = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    size = sum(float(value.double().square().sum()) for value in other.values())
    return math.sqrt(distance / size) if size else math.inf


def _steps(probe: Probe, words: Sequence[str], seconds: float) -> int:
    """Of each run, so that all of them take so long."""
    # Timed where no step can go wrong.
    trainer = probe.trainer(*words, "trainer.steps=3", "optimizer.lr=1e-12")
    trainer.train()
    begun = time.monotonic()
    trainer.train()
    each = (time.monotonic() - begun) / 3
    return max(_SHORTEST, min(_LONGEST, int(seconds / len(RATES) / max(each, 1e-6))))


def _rates(probe: Probe, words: Sequence[str], usual: float, steps: int) -> tuple[Rate, ...]:
    found = {factor: _run(probe, words, usual * factor, steps) for factor in RATES}
    # The best at an edge says that the edge is not the end.
    for step in (1 / 3, 3.0):
        for _ in range(2):
            edge = min(found) if step < 1 else max(found)
            if min(found, key=lambda factor: found[factor].loss) != edge:
                break
            found[edge * step] = _run(probe, words, usual * edge * step, steps)
    return tuple(found[factor] for factor in sorted(found))


def _run(probe: Probe, words: Sequence[str], lr: float, steps: int) -> Rate:
    losses = Losses()
    settings = (f"optimizer.lr={lr:.6g}", f"trainer.steps={steps}", "trainer.log_every=1")
    trainer = probe.trainer(*words, *settings, sink=losses)
    try:
        trainer.train()
    except NonFiniteError:
        return Rate(lr, math.inf)
    last = losses.kept[-max(1, steps // 3) :]
    return Rate(lr, sum(last) / len(last))
