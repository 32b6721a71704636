"""Accuracy against queries, seconds and memory."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from fwdlearn.compare.results import Result, Results
from fwdlearn.errors import MissingError


def draw(results: Results, path: Path) -> None:
    """Writes a PNG: means over the seeds as lines, least and most as bands.

    Raises:
        MissingError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingError(
            'no plot: matplotlib is not installed; pip install "fwdlearn[plots]", and the same '
            "command with the same output.dir draws it without training again"
        ) from error
    figure: Any = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    queries, seconds, memory = figure.subplots(1, 3, sharey=True)
    shown = [result for result in results.methods if result.best]
    for number, result in enumerate(shown):
        colour = f"C{number % 10}"
        style = "--" if result.method.remark is not None else "-"
        name = result.method.label + ("" if result.lr is None else f", lr {result.lr:g}")
        for axis, unit in ((queries, "queries"), (seconds, "seconds")):
            across, middle, low, high = _curve(result, unit)
            axis.plot(across, middle, style, color=colour, label=name)
            axis.fill_between(across, low, high, color=colour, alpha=0.2, linewidth=0)
        more = [(outcome.peak - outcome.start) / 2**20 for outcome in result.best]
        memory.plot(more, result.scores, "o", color=colour, label=name)
    queries.set(xlabel="queries", ylabel=results.measure)
    seconds.set(xlabel="seconds of steps")
    memory.set(xlabel="MiB beyond those before the first step")
    if shown:
        queries.legend(fontsize=8)
    figure.suptitle(f"{results.comparison.recipe.name}, {results.comparison.queries:,} queries")
    figure.savefig(path, dpi=110)


def _curve(result: Result, unit: str) -> tuple[list[float], ...]:
    """Along the evaluations that every seed has: an allocator may decide how many steps to take."""
    places = list(zip(*(outcome.curve for outcome in result.best), strict=False))
    across = [mean(getattr(point, unit) for point in place) for place in places]
    scores = [[point.score for point in place] for place in places]
    return across, [mean(s) for s in scores], [min(s) for s in scores], [max(s) for s in scores]
