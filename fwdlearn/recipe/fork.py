"""A run begun with another one's state and a recipe that differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwdlearn.errors import UsageError
from fwdlearn.ledger.forking import Parent
from fwdlearn.recipe.folder import differences, status
from fwdlearn.recipe.load import Recipe
from fwdlearn.recipe.replay import ledger_of, recipe_of, replay


def parent_of(run: Path, step: int | None, recipe: Recipe) -> Parent:
    """A run as it was after a step.

    Args:
        run: its folder.
        step: which; the last one when not given, of a run that diverged the last good one.
        recipe: of the run that is to begin with it.

    Raises:
        FwdlearnError: as `replay`.
    """
    if step is None and status(run) == "diverged":
        step = json.loads((run / "summary.json").read_text("utf-8"))["good_step"]
    again, ledger = replay(run, step, states=True), ledger_of(run)
    there, here = recipe_of(run).resolved(), recipe.resolved()
    about = {
        "run": str(run),
        "step": again.step,
        "ledger": ledger.hash(again.step).hex(),
        "changed": differences(there, here),
    }
    records = [ledger.record(number) for number in range(1, again.step + 1)]
    return Parent(again.assembly.trainer, again.at, records, about, _fresh(there, here))


def check_same_parent(header: Mapping[str, Any], run: Path, step: int | None, path: Path) -> None:
    """Raises UsageError unless the run at `path` began with that step of `run`."""
    begun = header.get("parent", {})
    ledger = ledger_of(run)
    known = begun.get("step", -1) <= ledger.steps and "ledger" in begun
    if (
        known
        and begun["ledger"] == ledger.hash(begun["step"]).hex()
        and step in (None, begun["step"])
    ):
        return
    what = f"began with step {begun['step']} of {begun['run']}" if begun else "began by itself"
    raise UsageError(f"--fork: {path} holds a run that {what}; choose another output.dir.")


def _fresh(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Sections whose states cannot go on: what they are, or what they are about, has changed."""

    def other(*names: str) -> bool:
        return any(there.get(name) != here.get(name) for name in names)

    rows = there["trainer"]["batch_size"] != here["trainer"]["batch_size"]
    fresh = ["estimator"] if other("estimator") else []
    fresh += ["allocator"] if other("allocator", "data") or rows else []
    old, new = there["optimizer"], here["optimizer"]
    own = {key for key in old.keys() | new.keys() if key not in ("schedule", "groups")}
    if not all(old.get(k) == new.get(k) or _number(old.get(k), new.get(k)) for k in own):
        fresh.append("optimizer")
    return fresh


def _number(*values: Any) -> bool:
    """Whether a setting is an amount, so that a state means the same with another one."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
