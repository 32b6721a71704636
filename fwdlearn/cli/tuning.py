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
    for line in found.begun:
        typer.echo(f"begins with {line}")
    if found.sigmas:
        tried = [(f"{one.value:.1e}", _number(one.snr or math.inf, "-")) for one in found.sigmas]
        show_pairs("sigma: differences of losses over what rounding and curvature add", tried)
        if not any(word.startswith("estimator.sigma") for word in found.words):
            typer.echo("  no two agree: the loss has steps, or noise alone; sigma is left as it is")
    rates = [(f"{one.value:.1e}", _number(one.loss, "diverged")) for one in found.rates]
    show_pairs(f"learning rate: training loss after {found.steps} steps", rates)
    lines = [f"standing still: {found.still:.4g}"]
    if found.stable is None:
        lines.append("no rate ends below that")
    else:
        edge = found.stable == found.rates[-1].value
        above = " (the largest tried)" if edge else ""
        lines.append(f"largest stable rate seen: {found.stable:.2g}{above}")
    if found.snr is not None:
        lines.append(f"gradient of a step: signal to noise {found.snr:.2g}")
    typer.echo("  " + "; ".join(lines))
    command = f"fwdlearn train {out}" if out else f"fwdlearn train {recipe} {' '.join(found.words)}"
    typer.echo(f"found {' '.join(found.words)}\n  {command}")


def _number(value: float, otherwise: str) -> str:
    return f"{value:.4g}" if math.isfinite(value) else otherwise
