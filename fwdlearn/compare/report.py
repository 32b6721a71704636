"""A comparison in words: a table, what has to be said about it, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fwdlearn.compare.results import Result, Results

COLUMNS = tuple("method,lr,score,of each seed,steps,queries,seconds,MiB,MiB more".split(","))


def rows(results: Results) -> list[tuple[str, ...]]:
    """The table, its head first."""
    head = tuple(results.measure if name == "score" else name for name in COLUMNS)
    return [head, *(_row(result, results.measure) for result in results.methods)]


def notes(results: Results) -> list[str]:
    """What a reader of the table must know."""
    comparison = results.comparison
    section = comparison.recipe.compare
    seeds, tries = len(section.seeds), comparison.runs_per_method
    found = [
        f"{comparison.recipe.name}: model, data, order of rows and first weights are the same for "
        f"every method and seed; {tries} runs of each method ({seeds} seeds), each with a budget "
        f"of {comparison.queries:,} queries. A query is a forward pass of one row; passes of "
        "evaluations are not counted.",
    ]
    for method in comparison.methods:
        if method.remark is not None:
            found.append(f"{method.label} {method.remark}")
    if section.lrs is not None:
        tried = ", ".join(f"{rate:g}" for rate in section.lrs)
        found.append(
            f"Every method was run at the learning rates {tried}; shown is its best by the mean "
            f"{results.measure} over seeds, measured on the rows that chose it."
        )
        found += [note for result in results.methods for note in _at_the_edge(result, section.lrs)]
    spread = "mean and standard deviation over seeds" if seeds > 1 else "of one seed"
    found.append(
        f"At the end: {results.measure}, {spread}. Seconds: of the steps, without "
        "evaluations. MiB: most memory in use, by the run's whole process on a CPU, by tensors on "
        "a GPU; more: what of it came on top once model and data were there."
    )
    for result in results.methods:
        for lr, seed, failure in result.failures:
            rate = "" if lr is None else f"lr {lr:g}, "
            found.append(f"{result.method.label} failed ({rate}seed {seed}): {failure.reason}")
    return found


def as_text(table: list[tuple[str, ...]]) -> list[str]:
    """Lines with columns of equal width; the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def as_markdown(results: Results, plot: str | None) -> str:
    """The table, the notes, and the plot if there is one."""
    head, *lines = rows(results)
    table = [head, ("---",) * len(head), *lines]
    parts = [f"# {results.comparison.recipe.name}: {results.measure} at equal queries"]
    parts.append("\n".join(f"| {' | '.join(row)} |" for row in table))
    parts += notes(results)
    if plot is not None:
        parts.append(f"![{results.measure} against queries, seconds and memory]({plot})")
    return "\n\n".join(parts) + "\n"


def as_json(results: Results, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, as plain values."""
    comparison, section = results.comparison, results.comparison.recipe.compare
    return {
        "recipe": comparison.recipe.name,
        "queries": comparison.queries,
        "seeds": section.seeds,
        "lrs": section.lrs,
        "runs_per_method": comparison.runs_per_method,
        "measure": results.measure,
        "notes": notes(results),
        "methods": [_method(result) for result in results.methods],
        "environment": environment,
    }


def _method(result: Result) -> dict[str, Any]:
    method = result.method
    resolved = method.recipe.resolved()
    found: dict[str, Any] = {
        "label": method.label,
        "estimator": resolved["estimator"],
        "allocator": resolved["allocator"],
        "queries_per_step": method.queries,
        "baseline": method.remark is not None,
        "steps": method.steps,
        "lr": result.lr,
    }
    if result.best:
        found |= {"mean": result.average("score"), "spread": result.spread}
        found |= {name: result.average(name) for name in ("seconds", "peak", "start")}
    found["runs"] = [asdict(outcome) for outcome in result.outcomes]
    found["failures"] = [
        {"lr": lr, "seed": seed, **asdict(failure)} for lr, seed, failure in result.failures
    ]
    return found


def _row(result: Result, measure: str) -> tuple[str, ...]:
    if not result.best:
        return (result.method.label, "", "failed", *[""] * (len(COLUMNS) - 3))
    mean, spread = readable(result.average("score"), measure), result.spread
    queries = {outcome.queries for outcome in result.best}
    peak, start = result.average("peak"), result.average("start")
    return (
        result.method.label,
        "own" if result.lr is None else f"{result.lr:g}",
        mean if spread is None else f"{mean} ± {readable(spread, measure)}",
        ", ".join(readable(one, measure) for one in result.scores),
        f"{round(result.average('steps')):,}",
        f"{max(queries):,}",
        f"{result.average('seconds'):.1f}",
        f"{peak / 2**20:,.0f}",
        f"{max(0.0, peak - start) / 2**20:,.1f}",
    )


def readable(value: float, measure: str) -> str:
    """Accuracies in percent."""
    return f"{100 * value:.2f} %" if measure == "accuracy" else f"{value:.4f}"


def _at_the_edge(result: Result, rates: list[float]) -> list[str]:
    if len(rates) < 2 or result.lr not in (min(rates), max(rates)):
        return []
    end = "smallest" if result.lr == min(rates) else "largest"
    return [f"{result.method.label} did best at the {end} rate; one beyond it may do better."]
