"""What `fwdlearn tune` found, as tables."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import typer

from fwdlearn.cli.tables import show_pairs
from fwdlearn.recipe.tune import Tuned


def show(recipe: str, found: Tuned, out: Path | None, as_json: bool) -> None:
    """Two tables, and the command that trains with what was found."""
    if as_json:
        # Infinity is no JSON.
        facts = json.loads(json.dumps(asdict(found)), parse_constant=lambda _: None)
        print(json.dumps(facts))
        return
    if found.sigmas:
        tried = [(f"{one.value:.1e}", _number(one.apart, "-")) for one in found.sigmas]
        show_pairs("sigma: relative distance of the estimate from its neighbours'", tried)
        if not any(word.startswith("estimator.sigma") for word in found.words):
            typer.echo("  no two agree: the loss has steps, or noise alone; sigma is left as it is")
    rates = [(f"{one.value:.1e}", _number(one.loss, "diverged")) for one in found.rates]
    show_pairs(f"learning rate: training loss after {found.steps} steps", rates)
    command = f"fwdlearn train {out}" if out else f"fwdlearn train {recipe} {' '.join(found.words)}"
    typer.echo(f"found {' '.join(found.words)}\n  {command}")


def _number(value: float, otherwise: str) -> str:
    return f"{value:.4g}" if math.isfinite(value) else otherwise
