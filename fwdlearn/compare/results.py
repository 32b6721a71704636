"""The figures of a comparison, from what its runs left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fwdlearn.compare.methods import Comparison, Method
from fwdlearn.compare.runs import Failure, Run
from fwdlearn.errors import StorageError
from fwdlearn.recipe.folder import status

MEASURES = ("accuracy", "nmse", "loss")
"""What methods are compared by; see `fwdlearn.metrics`."""


@dataclass(frozen=True)
class Point:
    """One evaluation. `seconds` are those of the steps before it."""

    queries: int
    seconds: float
    score: float


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to.

    Args:
        measure: the first of `MEASURES` that the data has.
        curve: every evaluation; the last one is the result.
        steps, queries: that it took.
        seconds: of its steps, without evaluations and without the start.
        peak: most bytes in use: of the whole process on a CPU, of tensors on a GPU.
        start: bytes of the same in use before the first step.
    """

    measure: str
    lr: float | None
    seed: int
    curve: tuple[Point, ...]
    steps: int
    queries: int
    seconds: float
    peak: int
    start: int

    @property
    def score(self) -> float:
        return self.curve[-1].score


@dataclass(frozen=True)
class Result:
    """One method.

    Args:
        outcomes: of the runs that finished.
        failures: learning rate, seed and reason of those that did not.
        lr: the rate that did best among those at which every seed finished.
        best: the outcomes at that rate, by seed; empty where there is no such rate.
    """

    method: Method
    outcomes: tuple[Outcome, ...]
    failures: tuple[tuple[float | None, int, Failure], ...]
    lr: float | None = None
    best: tuple[Outcome, ...] = ()

    @property
    def scores(self) -> list[float]:
        return [outcome.score for outcome in self.best]

    def average(self, name: str) -> float:
        """Mean over the seeds of a field of `Outcome`."""
        return mean(getattr(outcome, name) for outcome in self.best)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, where there are several."""
        return stdev(self.scores) if len(self.best) > 1 else None


@dataclass(frozen=True)
class Results:
    """All methods."""

    comparison: Comparison
    methods: tuple[Result, ...]

    @property
    def measure(self) -> str:
        """That of the runs, which have the same data."""
        found = (outcome.measure for result in self.methods for outcome in result.outcomes)
        return next(found, "accuracy")


def summarise(
    comparison: Comparison, every: Sequence[Run], failures: Mapping[Path, Failure]
) -> Results:
    """Reads what all runs left; those that neither finished nor failed are passed over."""
    results = []
    for method in comparison.methods:
        outcomes, failed = [], []
        for run in (run for run in every if run.method is method):
            found = failures.get(run.folder) or outcome(run)
            if isinstance(found, Outcome):
                outcomes.append(found)
            elif found is not None:
                failed.append((run.lr, run.seed, found))
        best = _best(comparison, outcomes)
        lr = best[0].lr if best else None
        results.append(Result(method, tuple(outcomes), tuple(failed), lr, best))
    return Results(comparison, tuple(results))


def outcome(run: Run) -> Outcome | Failure | None:
    """What a run came to; None where it has not finished.

    Raises:
        StorageError: its files cannot be read.
    """
    if status(run.folder) != "finished":
        return None
    try:
        summary = json.loads((run.folder / "summary.json").read_text("utf-8"))
        lines = (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{run.folder}: its results cannot be read: {error}; delete the folder and compare "
            "again with the same output.dir"
        ) from error
    known = (one for one in MEASURES if summary.get(f"eval.{one}") is not None)
    measure = next(known, None)
    if measure is None:
        return Failure(2, "the data has no evaluation rows to compare by; give it some")
    seconds, before, curve = 0.0, 0, []
    for record in records:
        if record.get("queries_per_second"):
            seconds += (record["queries"] - before) / record["queries_per_second"]
            before = record["queries"]
        if f"eval.{measure}" in record:
            curve.append(Point(record["queries"], seconds, record[f"eval.{measure}"]))
    sizes = (summary["memory.peak_bytes"], summary["memory.start_bytes"])
    spent = (summary["steps"], summary["queries"], seconds)
    return Outcome(measure, run.lr, run.seed, tuple(curve), *spent, *sizes)


def _best(comparison: Comparison, outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """Those at the rate that did best, of rates at which every seed finished."""
    at = [tuple(one for one in outcomes if one.lr == lr) for lr in comparison.lrs]
    whole = [some for some in at if len(some) == len(comparison.recipe.compare.seeds)]

    def merit(some: tuple[Outcome, ...]) -> float:
        average = mean(one.score for one in some)
        return average if some[0].measure == "accuracy" else -average

    return max(whole, key=merit, default=())
