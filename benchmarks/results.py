"""Where measurements go, and what they say of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fwdlearn.recipe.environment import environment

FOLDER = Path(__file__).parent / "results"


def write(path: Path, results: Any, device: str = "cpu") -> None:
    """Writes results with what matters of the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = environment(device)
    kept = ("fwdlearn", "python", "packages", "cpus", "device_name", "cuda", "git_commit")
    record = {"environment": {name: facts[name] for name in kept}, "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
