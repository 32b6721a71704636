"""What is compared: a recipe for each method, at one budget of queries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fwdlearn.baselines import Baseline
from fwdlearn.errors import FwdlearnError, MissingError, RecipeError, UsageError
from fwdlearn.recipe.load import Recipe, load_recipe
from fwdlearn.recipe.schema import CompareSection
from fwdlearn.signals import measured

WORDS = tuple(CompareSection.model_fields)
"""On the command line, short for the keys of the section `compare`."""

_LISTS = ("estimators", "seeds", "lrs")
_BACKPROP = {
    "name": "fwdlearn.baselines:Backpropagation",
    "as": "backprop",
    # It has no directions to divide, and should not pay for signals.
    "with": {"allocator": "Uniform"},
}
_EVALUATIONS = 10
"""Of a run whose recipe does not say how often."""


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        label: what it is called.
        recipe: the same as that of every other method but for what makes the method.
        queries: that a step takes.
        remark: on a baseline, what a reader must know of it.
    """

    label: str
    recipe: Recipe
    queries: int
    remark: str | None = None

    @property
    def steps(self) -> int:
        assert self.recipe.trainer.queries is not None
        return self.recipe.trainer.queries // self.queries


@dataclass(frozen=True)
class Comparison:
    """Methods, and what is the same for them.

    Args:
        recipe: as given, with the section `compare`.
        queries: the budget of a run.
        methods: in the order of the tables.
    """

    recipe: Recipe
    queries: int
    methods: tuple[Method, ...]

    @property
    def lrs(self) -> tuple[float | None, ...]:
        """Learning rates that every method tries; None is the recipe's own."""
        return tuple(self.recipe.compare.lrs or (None,))

    @property
    def runs_per_method(self) -> int:
        return len(self.lrs) * len(self.recipe.compare.seeds)


def plan(recipe: str, overrides: Sequence[str] = ()) -> Comparison:
    """Reads and checks a recipe and every method of its comparison.

    A budget in steps is turned into the queries that they take with the recipe's own estimator.

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: as for `load_recipe`; `estimators=a,b`, `seeds=0,1`, `lrs=1e-3,1e-2` and
            `backprop=false` stand for keys of the section `compare`.

    Raises:
        RecipeError: with all problems of all methods, one line each.
        MissingError: the same, when all that is wrong is a file or package that is not there.
    """
    words = [_spelt_out(word) for word in overrides]
    if any(word.startswith("trainer.queries=") for word in words):
        words.append("trainer.steps=null")
    base = load_recipe(recipe, words)
    own = _queries(base)
    queries = base.trainer.queries or (base.trainer.steps or 0) * own
    every = base.trainer.evaluate_every
    times = queries / (every * own) if every else _EVALUATIONS
    items = [*base.compare.estimators, *([_BACKPROP] if base.compare.backprop else [])]
    methods, lines, missing = [], [], True
    for item, label in zip(items, _labels(items, base), strict=True):
        try:
            methods.append(_method(recipe, words, item, label, base, queries, times))
        except FwdlearnError as error:
            if not isinstance(error, RecipeError | MissingError | UsageError):
                raise
            missing = missing and isinstance(error, MissingError)
            lines += [f"{label}: {line}" for line in str(error).splitlines()]
    if lines:
        raise MissingError("\n".join(lines)) if missing else RecipeError(lines)
    return Comparison(base, queries, tuple(methods))


def _spelt_out(word: str) -> str:
    removes = word.startswith("~")
    key, equals, text = word.removeprefix("~").partition("=")
    if key not in WORDS:
        return word
    if key in _LISTS and equals and not text.lstrip().startswith("["):
        text = f"[{text}]"
    return f"{'~' * removes}compare.{key}{equals}{text}"


def _method(
    recipe: str,
    words: Sequence[str],
    item: dict[str, Any],
    label: str,
    base: Recipe,
    queries: int,
    times: float,
) -> Method:
    given = {key: value for key, value in item.items() if key not in ("as", "with")}
    own = base.components["estimator"]
    if item.get("name", own.name) == own.name:
        given = {"name": own.name, **_as_given(base), **given}
    more = {"compare": None, "estimator": given, **item.get("with", {})}
    more |= {"trainer.steps": None, "trainer.queries": queries}
    plain = [*words, *(f"{key}={json.dumps(value)}" for key, value in more.items())]
    step = _queries(load_recipe(recipe, plain))
    steps = queries // step
    if not steps:
        raise UsageError(
            f"a step takes {step:,} queries, and the budget is {queries:,}; raise trainer.queries "
            "or trainer.steps, or lower allocator.directions or trainer.batch_size."
        )
    every = max(1, round(steps / times))
    # Records end where evaluations stand, so that seconds of steps are known there.
    often = [f"trainer.{key}={every}" for key in ("evaluate_every", "log_every")]
    finished = load_recipe(recipe, [*plain, *often])
    estimator = finished.components["estimator"]()
    remark = estimator.remark if isinstance(estimator, Baseline) else None
    return Method(label, finished, step, remark)


def _as_given(base: Recipe) -> dict[str, Any]:
    """Arguments of the recipe's own estimator, without its defaults."""
    section = base.source.data["estimator"]
    return {key: value for key, value in section.items() if key != "name"}


def _queries(recipe: Recipe) -> int:
    """What a step takes, the first one where that changes."""
    estimator, allocator = (recipe.components[name]() for name in ("estimator", "allocator"))
    rows = recipe.trainer.batch_size
    pairs = allocator.budget(rows, allocator.init())
    return int(estimator.traits.cost(rows, pairs, measured(allocator.signals)))


def _labels(items: Sequence[dict[str, Any]], base: Recipe) -> list[str]:
    """A name for each: the one given, that of the class, with its arguments where that is not one.

    Raises:
        RecipeError: two are called the same.
    """
    own = base.components["estimator"].name
    names = [str(item.get("name", own)).rpartition(":")[2] for item in items]
    labels = []
    for item, name in zip(items, names, strict=True):
        told = {key: value for key, value in item.items() if key not in ("name", "as", "with")}
        told |= item.get("with", {})
        shown = ", ".join(f"{key}={value}" for key, value in told.items())
        several = names.count(name) > 1 and bool(told)
        labels.append(str(item.get("as", f"{name}({shown})" if several else name)))
    for label in labels:
        # File systems may take names for the same that differ in case alone.
        if [other.lower() for other in labels].count(label.lower()) > 1:
            line = f"compare.estimators: two are called {label!r}; tell them apart with `as: NAME`"
            raise RecipeError([line])
    return labels
