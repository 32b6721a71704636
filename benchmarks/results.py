"""Where measurements go, and what they say of the machine."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from fwdlearn.recipe.environment import environment, git_commit

FOLDER = Path(__file__).parent / "results"


def write(path: Path, results: Any, device: str = "cpu") -> None:
    """Writes results with what matters of the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = environment(device)
    kept = ("fwdlearn", "python", "packages", "cpus", "device_name", "cuda", "git_commit")
    known = {name: facts[name] for name in kept} | {"threads": facts["torch_threads"]}
    record = {"environment": known, "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def merge(
    path: Path,
    entries: list[dict[str, Any]],
    works: Collection[str],
    rounds: int,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Writes entries beside those of other works that the file holds.

    Each says how it was measured, since those of one file may differ.

    Args:
        path: the file; it need not exist.
        entries: each of a `work`.
        works: all there are: entries of any other are dropped.
        rounds: that were measured.
        device: that they were measured on.

    Returns:
        All entries of the file, in the order of the works.
    """
    how = {"rounds": rounds, "threads": torch.get_num_threads(), "commit": git_commit()}
    results, measured = [entry | how for entry in entries], {entry["work"] for entry in entries}
    if path.exists():
        old = json.loads(path.read_text("utf-8"))["results"]
        results += [entry for entry in old if entry["work"] not in measured]
    order = list(works)
    results = [entry for entry in results if entry["work"] in order]
    results.sort(key=lambda entry: order.index(entry["work"]))
    write(path, results, device)
    return results
