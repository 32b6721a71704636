"""`fwdlearn compare`: every method of a comparison trained, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from fwdlearn.compare.methods import Comparison, plan
from fwdlearn.compare.plot import draw
from fwdlearn.compare.report import as_json, as_markdown, as_text, notes, readable, rows
from fwdlearn.compare.results import Outcome, Results, outcome, summarise
from fwdlearn.compare.runs import Failure, Run, carry_out, recipe_of, runs
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.recipe.build import device_of
from fwdlearn.recipe.environment import environment
from fwdlearn.recipe.folder import RunFolder, storing
from fwdlearn.recipe.source import Problem

_RESULTS, _PLOT = "compare.json", "compare.png"


def compare(recipe: str, overrides: Sequence[str], jobs: int, quiet: bool) -> int:
    """Compares, and prints the table, what is to be said about it, and the folder.

    Returns:
        0 where every method has a learning rate at which every seed finished, or else the exit
        status of the first run that failed.
    """
    comparison = plan(recipe, overrides)
    folder = _open(comparison)
    try:
        results = _carry_out(comparison, folder, jobs, quiet)
    finally:
        folder.close()
    head, *lines = as_text(rows(results))
    typer.echo(typer.style(head, bold=True))
    typer.echo("\n".join([*lines, "", *notes(results)]))
    print(folder.path)
    lost = [result for result in results.methods if not result.best]
    return lost[0].failures[0][2].exit_code if lost else 0


def _carry_out(comparison: Comparison, folder: RunFolder, jobs: int, quiet: bool) -> Results:
    every = runs(comparison, folder.path)
    todo = [run for run in every if not run.is_done(comparison.recipe.output.overwrite)]
    facts = {k: v for k, v in environment(device_of(comparison.recipe)).items() if k != "argv"}
    folder.write_json(_RESULTS, as_json(summarise(comparison, (), {}), facts))
    folder.write("recipe.yaml", comparison.recipe.to_yaml())
    for method in comparison.methods:
        folder.write(recipe_of(method, folder.path).name, method.recipe.to_yaml())
    ended = len(every) - len(todo)
    if ended and not quiet:
        typer.echo(f"{ended} of {len(every)} runs are there already")

    def tell(run: Run, failure: Failure | None) -> None:
        nonlocal ended
        ended += 1
        if not quiet:
            typer.echo(f"[{ended}/{len(every)}]  {_line(run, failure)}")

    failures: dict[Path, Failure] = {}
    try:
        carry_out(todo, jobs, failures, tell)
    finally:
        # Also when it was interrupted: what has finished is not lost.
        results = summarise(comparison, every, failures)
        folder.write_json(_RESULTS, as_json(results, facts))
        folder.write("compare.md", as_markdown(results, _drawn(results, folder.path)))
    return results


def _line(run: Run, failure: Failure | None) -> str:
    parts = [run.method.label, *([] if run.lr is None else [f"lr {run.lr:g}"]), f"seed {run.seed}"]
    found = failure or outcome(run)
    if isinstance(found, Outcome):
        parts.append(f"{found.measure} {readable(found.score, found.measure)}")
        parts.append(f"{found.seconds:.1f} s")
    elif found is not None:
        parts.append(f"failed: {found.reason}")
    return "  ".join(parts)


def _drawn(results: Results, folder: Path) -> str | None:
    """The name of the plot, if there is one."""
    try:
        with storing(folder / _PLOT):
            draw(results, folder / _PLOT)
    except MissingError as error:
        typer.echo(str(error), err=True)
        return None
    return _PLOT


def _open(comparison: Comparison) -> RunFolder:
    """A new folder, or that of a comparison to go on with."""
    recipe = comparison.recipe
    if recipe.output.dir is None:
        return RunFolder.next_free(Path("runs") / f"{recipe.name}-compare")
    path = Path(recipe.output.dir).expanduser()
    with storing(path):
        path.mkdir(parents=True, exist_ok=True)
        present = sorted(entry.name for entry in path.iterdir())
    try:
        if present and not (path / _RESULTS).exists():
            raise UsageError(
                f"{path} is not empty and holds no comparison (it has {', '.join(present[:3])}); "
                "choose another output.dir."
            )
        return RunFolder(path)
    except UsageError as error:
        raise recipe.error([Problem(("output", "dir"), str(error))]) from error
