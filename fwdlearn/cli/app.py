"""The commands. Whatever imports torch is imported inside the command that needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fwdlearn import __version__
from fwdlearn.errors import StorageError, UsageError

app = typer.Typer(
    name="fwdlearn",
    help="Train neural networks with forward passes only.",
    epilog="Start with: fwdlearn train quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeWord = Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or a shipped name.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change; ~KEY removes one."),
]
RunFolderWord = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="One line of JSON instead.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"fwdlearn {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Train neural networks with forward passes only."""


@app.command()
def train(
    recipe: RecipeWord,
    overrides: Overrides = None,
    fork: Annotated[
        Path | None, typer.Option("--fork", metavar="RUN", help="Begin where another run is.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", help="Of that run; its last one if not given.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a model as a recipe says."""
    from fwdlearn.recipe.load import load_recipe

    checked = load_recipe(recipe, overrides or ())

    from fwdlearn.recipe.run import train as carry_out
    from fwdlearn.sinks.console import Console

    console = None if quiet else Console(checked.name)
    _, folder = carry_out(checked, console, fork, step)
    print(folder)


@app.command()
def resume(
    run: RunFolderWord,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Go on with a run that was stopped; `train` with its recipe does the same."""
    from fwdlearn.recipe.replay import recipe_of

    checked = recipe_of(run, keep=True)

    from fwdlearn.recipe.run import train as carry_out
    from fwdlearn.sinks.console import Console

    _, folder = carry_out(checked, None if quiet else Console(run.name))
    print(folder)


@app.command()
def replay(
    run: RunFolderWord,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    step: Annotated[int | None, typer.Option("--step", help="The last one if not given.")] = None,
) -> None:
    """Rebuild the weights of any step of a run from its ledger."""
    from fwdlearn.recipe.replay import replay as rebuild

    if out.exists():
        raise UsageError(f"{out} is there already; choose another name for --out")
    made = rebuild(run, step)
    made.save(out)
    _warn_of_rounding(made.moved)
    print(f"step {made.step}, from step {made.first}, {made.made} made again", file=sys.stderr)
    print(out)


@app.command()
def apply(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="A model's folder; - for a model from its seed.")
    ],
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="A run's ledger.bin.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
) -> None:
    """Make the trained model from the model that it was and a ledger, without the data."""
    from fwdlearn.recipe.apply import apply as make

    if out.exists():
        raise UsageError(f"{out} is there already; choose another name for --out")
    made = make(None if str(base) == "-" else base, ledger)
    made.save(out)
    _warn_of_rounding(made.moved)
    print(out)


def _warn_of_rounding(moved: str) -> None:
    if moved:
        print(f"warning: {moved}; the weights may be rounded otherwise", file=sys.stderr)


@app.command()
def export(
    run: RunFolderWord,
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="A new file, or folder.")],
    form: Annotated[
        str, typer.Option("--format", help="transformers, peft, safetensors or ledger.")
    ] = "safetensors",
) -> None:
    """Write a run's model, or its ledger, for use elsewhere."""
    from fwdlearn.recipe.export import export as write

    write(run, form, out)
    print(out)


@app.command()
def verify(
    run: RunFolderWord,
    rebuild: Annotated[
        bool, typer.Option("--replay", help="Also rebuild the weights, and compare.")
    ] = False,
) -> None:
    """Check every file of a run that has digests."""
    from fwdlearn.cli.tables import show_pairs
    from fwdlearn.recipe.verify import verify as look

    found = look(run, rebuild)
    show_pairs(str(run), [(each.what, each.says) for each in found])
    raise typer.Exit(0 if all(each.sound for each in found) else StorageError.exit_code)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="With runs in it.")] = Path(
        "runs"
    ),
    by: Annotated[
        str | None, typer.Option("--by", metavar="METRIC", help="Sort by it, smallest first.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs, the oldest first."""
    from fwdlearn.cli.histories import show_runs

    show_runs(folder, by, as_json)


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="That of another.")],
    as_json: AsJson = False,
) -> None:
    """Say how two runs differ: recipe, environment, first step, metrics. Exits with 1 if so."""
    from fwdlearn.cli.histories import show_difference

    raise typer.Exit(1 if show_difference(one, other, as_json) else 0)


@app.command()
def compare(
    recipe: RecipeWord,
    overrides: Overrides = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Runs at a time; more than one blurs the seconds.")
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train with several estimators, and backpropagation, at equal queries.

    estimators=A,B names them; seeds=0,1,2 and lrs=1e-3,1e-2 say what each runs with, and
    backprop=false leaves backpropagation out.
    """
    from fwdlearn.cli.comparing import compare as carry_out

    raise typer.Exit(carry_out(recipe, overrides or (), jobs, quiet))


@app.command()
def validate(recipe: RecipeWord, overrides: Overrides = None) -> None:
    """Check a recipe and show it with every default filled in."""
    from fwdlearn.recipe.load import load_recipe

    checked = load_recipe(recipe, overrides or ())
    print(checked.to_yaml(), end="")
    print(f"{recipe}: no problems", file=sys.stderr)


@app.command()
def ls(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="recipe, estimator, model, ...")
    ] = None,
) -> None:
    """List recipes and components by name."""
    from fwdlearn.cli.listing import listing

    listing(kind)


@app.command()
def cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A new file, or a folder.")],
) -> None:
    """Copy a shipped recipe, to change it."""
    from fwdlearn.recipe.locate import shipped
    from fwdlearn.registry import suggest

    recipes = shipped()
    if name not in recipes:
        raise UsageError(f"no shipped recipe {name!r}; {suggest(name, recipes)}")
    target = path / f"{name}.yaml" if path.is_dir() else path
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(recipes[name])
    except FileExistsError as error:
        raise UsageError(f"{target} is there already; choose another name") from error
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror}") from error
    print(target)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's model, on other data if an override names it."""
    from fwdlearn.recipe.evaluate import evaluate as measure

    result = measure(run, overrides or ())
    if as_json:
        print(json.dumps(result))
        return
    from fwdlearn.cli.tables import show_pairs

    show_pairs(
        str(run),
        [
            (key, _percent(value) if key == "accuracy" else f"{value:.4f}")
            for key, value in result.items()
        ],
    )


@app.command()
def explain(recipe: RecipeWord, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say how a recipe would run: which rung and why, memory, queries per second."""
    from fwdlearn.recipe.load import load_recipe

    checked = load_recipe(recipe, overrides or ())

    from fwdlearn.recipe.build import build

    facts = build(checked).explain()
    if as_json:
        print(json.dumps(facts))
        return
    from fwdlearn.cli.tables import explanation, show_pairs

    show_pairs(checked.name, explanation(facts))


@app.command()
def tune(
    recipe: RecipeWord,
    overrides: Overrides = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="That the short runs may take together.")
    ] = 120.0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Writes the recipe, tuned.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find sigma and learning rate for a recipe, by short runs."""
    from fwdlearn.recipe.load import load_recipe

    load_recipe(recipe, overrides or ())
    if out is not None and out.exists():
        raise UsageError(f"{out} is there already; choose another name for --out")

    from fwdlearn.cli.tuning import show
    from fwdlearn.recipe.tune import tune as probe

    found = probe(recipe, overrides or (), seconds)
    if out is not None:
        words = [*(overrides or ()), *found.words]
        out.write_text(load_recipe(recipe, words).to_yaml(), "utf-8")
    show(recipe, found, out, as_json)


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="An estimator or allocator: name or module:Class."),
    ],
) -> None:
    """Check an estimator or allocator against everything that it promises."""
    from fwdlearn.cli.checking import check as examine

    raise typer.Exit(0 if examine(target) else 1)


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing and what stands in the way."""
    from fwdlearn.cli.doctoring import examine

    raise typer.Exit(0 if examine() else 1)


def _percent(value: float) -> str:
    return f"{value:.2%}"
