"""Finding the cliff: which sigma an estimator can use, and the largest learning rate that learns.

Sigma: estimates of one batch along the same directions, at sizes a factor of about three apart.
Where sigma is too small, rounding makes neighbours differ; where it is too large, curvature does.
In between they agree, and there a sigma is right whatever it is. Learning rates: short runs from
the same weights, over the same rows and with the same random numbers, so that little but the rate
tells them apart, and one that stands still. Both begin at the recipe's own number, or where it has
none at what the trained part and the optimizer suggest (`fwdlearn.recipe.defaults`).
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fwdlearn.counts import sharing_rows
from fwdlearn.errors import NonFiniteError, UsageError
from fwdlearn.recipe.build import assemble, load_parts
from fwdlearn.recipe.defaults import default_rate, default_sigma, trained_part
from fwdlearn.recipe.load import Recipe, load_recipe
from fwdlearn.trainer import Trainer

SIGMAS, RATES = 9, (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
# Neighbours that differ by more agree about nothing: a loss with steps, or noise alone.
_AGREE = 0.5
# What curvature may change of an estimate whose noise is many times itself.
_CLOSE = 0.05
_SHORTEST, _LONGEST = 10, 200
# A rate that changes no weight.
_NOTHING = 1e-12


@dataclass(frozen=True)
class Sigma:
    """An estimate at a sigma.

    Args:
        value: of sigma.
        apart: the relative distance from the estimate at the next one, the smaller of the two
            sides' larger; infinite where an estimate failed.
        snr: how many times as large the differences of losses are as what rounding and curvature
            add to them, 1 / apart.
    """

    value: float
    apart: float

    @property
    def snr(self) -> float:
        return 1 / self.apart if self.apart else math.inf


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
        still: loss of a run that stands still, over the same rows.
        stable: the largest rate whose loss is not above that; None where there is none.
        snr: signal to noise of one step's gradient, where the estimator says its variance.
        begun: why the search began where it did, a line for each number that the recipe leaves out.
    """

    sigmas: tuple[Sigma, ...]
    rates: tuple[Rate, ...]
    steps: int
    words: tuple[str, ...]
    still: float = math.nan
    stable: float | None = None
    snr: float | None = None
    begun: tuple[str, ...] = ()


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
    begin = _Beginning(probe)
    sigmas = tuple(_sigmas(begin.trainer, begin.sigma))
    words = []
    least = min((one.apart for one in sigmas), default=math.inf)
    if least <= _AGREE:
        # The largest of those that agree is the furthest from rounding.
        limit = max(_CLOSE, 2 * least)
        best = max(one.value for one in sigmas if one.apart <= limit)
        words.append(f"estimator.sigma={best:.3g}")
    steps = _steps(probe, words, seconds)
    still = _run(probe, words, _NOTHING, steps).loss
    rates = _rates(probe, words, begin.rate, steps)
    best_rate = min(rates, key=lambda one: one.loss)
    if math.isinf(best_rate.loss):
        raise UsageError(
            f"every learning rate from {rates[0].value:.1e} to {rates[-1].value:.1e} diverges; "
            "begin with a smaller optimizer.lr."
        )
    return Tuned(
        sigmas,
        rates,
        steps,
        (*words, f"optimizer.lr={best_rate.value:.3g}"),
        still,
        max((one.value for one in rates if one.loss <= still), default=None),
        begin.snr,
        tuple(begin.said),
    )


class _Beginning:
    """Where the search begins.

    Attributes:
        trainer: of the recipe, which has not taken a step.
        sigma: of the estimator, or None where it has none.
        rate: of the optimizer.
        snr: of the first step's gradient, or None.
        said: why, of what the recipe does not say.
    """

    def __init__(self, probe: Probe) -> None:
        self.trainer = probe.trainer()
        recipe, first = probe.whole, self.trainer.estimate()
        sizes, square = {}, 0.0
        for name in first.grad:
            value = first.grad[name]
            sizes[name], square = value.numel(), square + float(value.double().square().sum())
        variance = float(first.info.get("variance", 0.0))
        self.snr = (square - variance) / variance if variance else None
        optimizer, given = recipe.components["optimizer"], recipe.source.data
        self.rate, self.said = float(optimizer.settings["lr"]), []
        self.sigma = getattr(self.trainer.estimator, "sigma", None)
        sizes = {name: size for name, size in sizes.items() if not _has_rate(recipe, name)}
        if not sizes:
            return
        values = list(self.trainer.model.parameters())
        entries, total = sum(sizes.values()), sum(value.numel() for value in values)
        part = trained_part(sizes, entries, total)
        if "lr" not in _said(given, "optimizer"):
            found = default_rate(
                optimizer.short,
                part,
                entries,
                _directions(self.trainer, first.queries),
                float(optimizer.settings.get("momentum") or 0),
            )
            if found is not None:
                self.rate = found.value
                self.said.append(f"lr {found.value:.3g} for {found.reason}")
        on_weights = self.trainer.estimator.traits.perturbs == "weights"
        if self.sigma is not None and on_weights and "sigma" not in _said(given, "estimator"):
            dtypes = [value.dtype for value in values if value.is_floating_point()]
            chosen = default_sigma(part, max(set(dtypes), key=dtypes.count))
            self.sigma = chosen.value
            self.said.append(f"sigma {chosen.value:.3g} for {chosen.reason}")


def _directions(trainer: Trainer, queries: int) -> float:
    """How many independent ones a step has that took so many queries."""
    rows, traits = len(trainer.batch(0)), trainer.estimator.traits
    sharing = sharing_rows(getattr(trainer.allocator, "sharing", 1), rows)
    pairs = (queries - rows * traits.queries_per_row) / max(1, traits.queries_per_direction)
    return max(1.0, pairs / sharing)


def _said(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """What a recipe itself says of a component; it may be a name alone."""
    found = data.get(section)
    return found if isinstance(found, Mapping) else {}


def _has_rate(recipe: Recipe, name: str) -> bool:
    """Whether a parameter has a rate of its own, by the first group that it matches."""
    group = next((g for p, g in recipe.groups.items() if fnmatch.fnmatchcase(name, p)), None)
    return group is not None and "lr" in group.settings


def _sigmas(trainer: Trainer, usual: float | None) -> Iterator[Sigma]:
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
    trainer = probe.trainer(*words, "trainer.steps=3", f"optimizer.lr={_NOTHING}")
    trainer.train()
    begun = time.monotonic()
    trainer.train()
    each = (time.monotonic() - begun) / 3
    return max(_SHORTEST, min(_LONGEST, int(seconds / (len(RATES) + 1) / max(each, 1e-6))))


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
