"""Where measurements go, and what they say of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fwdlearn.recipe.environment import environment

FOLDER = Path(__file__).parent / "results"


def write(path: Path, results: Any, device: str = "cpu") -> None:
    """Writes results with the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(device), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
