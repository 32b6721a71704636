"""What the commands about past runs print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from fwdlearn.errors import UsageError
from fwdlearn.recipe.folder import differences
from fwdlearn.recipe.history import Held, environments, first_difference, read_run, runs_in

_METRICS = ("train.loss", "eval.loss", "eval.accuracy", "queries", "seconds")


def show_runs(folder: Path, by: str | None, as_json: bool) -> None:
    """One line a run."""
    found = runs_in(folder)
    if by is not None:
        ranked = [run for run in found if isinstance(run.summary.get(by), int | float)]
        if found and not ranked:
            raise UsageError(f"no run has {by!r} in its summary; {', '.join(_METRICS)} are there.")
        found = sorted(ranked, key=lambda run: run.summary[by])
    if as_json:
        print(json.dumps([{"run": str(run.path), **run.summary} for run in found]))
        return
    rows = [("run", "status", "steps", "loss", "accuracy", "estimator"), *map(_row, found)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for number, row in enumerate(rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(typer.style(line.rstrip(), bold=not number))


def show_difference(one: Path, other: Path, as_json: bool) -> bool:
    """How two runs differ; returns whether they do in anything but time and place."""
    a, b = read_run(one), read_run(other)
    facts: dict[str, Any] = {
        "recipe": differences(a.recipe, b.recipe),
        "environment": environments(a, b),
        "first difference": first_difference(one, other),
        "metrics": {
            name: [a.summary.get(name), b.summary.get(name)]
            for name in _METRICS
            if a.summary.get(name) != b.summary.get(name)
        },
    }
    if as_json:
        print(json.dumps(facts))
    else:
        for name in ("recipe", "environment"):
            typer.echo(typer.style(name, bold=True))
            typer.echo("\n".join(f"  {line}" for line in facts[name] or ["the same"]))
        typer.echo(typer.style("first difference", bold=True))
        typer.echo(f"  {facts['first difference'] or 'unknown: a run has no ledger'}")
        typer.echo(typer.style("metrics", bold=True))
        for name, (mine, theirs) in facts["metrics"].items():
            typer.echo(f"  {name} is {mine} there and {theirs} here")
    return bool(facts["recipe"]) or not str(facts["first difference"]).startswith("none")


def _row(run: Held) -> tuple[str, ...]:
    summary = run.summary
    loss = summary.get("eval.loss", summary.get("train.loss"))
    accuracy = summary.get("eval.accuracy")
    estimator = run.recipe.get("estimator")
    return (
        str(run.path),
        str(summary.get("status", "unknown")),
        str(summary.get("steps", "")),
        f"{loss:.4f}" if isinstance(loss, float) else "",
        f"{accuracy:.1%}" if isinstance(accuracy, float) else "",
        str(estimator.get("name", "")) if isinstance(estimator, dict) else "",
    )
