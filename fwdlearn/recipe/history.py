"""Runs side by side: what is in a folder of runs, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwdlearn.errors import MissingError
from fwdlearn.ledger.journal import LEDGER
from fwdlearn.ledger.records import Ledger, same
from fwdlearn.recipe.folder import differences
from fwdlearn.recipe.text import parse


@dataclass(frozen=True)
class Held:
    """What a run's folder says of it.

    Args:
        path: the folder.
        recipe: resolved.
        summary: `summary.json`, empty where there is none to read.
        environment: `env.json`, the same.
    """

    path: Path
    recipe: Mapping[str, Any]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]


def read_run(path: Path) -> Held:
    """Reads a run's folder.

    Raises:
        MissingError: it holds no run.
    """
    if not (path / "resolved.yaml").is_file():
        raise MissingError(f"{path} holds no run (no resolved.yaml); give the folder of a run.")
    recipe = parse((path / "resolved.yaml").read_text("utf-8"), str(path))[0].data
    held = (_json(path / name) for name in ("summary.json", "env.json"))
    return Held(path, recipe if isinstance(recipe, dict) else {}, *held)


def runs_in(folder: Path) -> list[Held]:
    """The runs in a folder and the folders in it, by when they started.

    Raises:
        MissingError: there is no such folder.
    """
    if not folder.is_dir():
        raise MissingError(f"{folder} is no folder; give one that holds runs.")
    found = [read_run(file.parent) for file in folder.glob("**/resolved.yaml")]
    return sorted(found, key=lambda run: (str(run.environment.get("started", "")), run.path))


def first_difference(one: Path, other: Path) -> str | None:
    """Where two ledgers part, in words; None where one of the runs has none."""
    if not ((one / LEDGER).exists() and (other / LEDGER).exists()):
        return None
    first, second = Ledger(one / LEDGER), Ledger(other / LEDGER)
    for name in ("weights", "data"):
        if first.header[name] != second.header[name]:
            return f"other {name} from the start"
    for step, (a, b) in enumerate(zip(first, second, strict=False), 1):
        if not same(a, b):
            return f"step {step}: loss {a.loss:.6g} and {b.loss:.6g}"
    if first.steps != second.steps:
        return f"none in {min(first.steps, second.steps)} steps; then one of them ends"
    return f"none in {first.steps} steps"


def environments(one: Held, other: Held) -> list[str]:
    """How what two runs ran on differs."""
    return differences(
        *({k: v for k, v in run.environment.items() if k not in _TIMES} for run in (one, other))
    )


_TIMES = ("started", "continued", "argv", "overrides")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
