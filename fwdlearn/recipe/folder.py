"""The folder of a run: which one, what may be replaced, and writes that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwdlearn.errors import UsageError
from fwdlearn.ledger.files import replace_file, storing
from fwdlearn.ledger.journal import LEDGER
from fwdlearn.sinks.jsonl import plain

OURS = (
    "ledger.bin snapshots parent.safetensors summary.json metrics.jsonl model tensorboard wandb "
    "env.json recipe.yaml resolved.yaml"
).split()
"""Everything that a run writes; nothing else in a folder is ever touched. In the order in which it
is removed: a folder that a crash left half empty still says that a run was there."""


class RunFolder:
    """An open run folder. Held by one process at a time.

    Args:
        path: the folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _lock(path)

    @classmethod
    def named(cls, path: Path, overwrite: bool) -> RunFolder:
        """The folder that the user named, with the run that it holds unless that is replaced.

        Raises:
            UsageError: it holds something else, or a run that is going on.
            StorageError: it cannot be made or emptied.
        """
        with storing(path):
            path.mkdir(parents=True, exist_ok=True)
            entries = sorted(entry.name for entry in path.iterdir())
            present = [name for name in entries if not _is_partial(name)]
        if present and not (path / "resolved.yaml").exists() and not overwrite:
            raise UsageError(
                f"{path} is not empty and holds no run (it has {', '.join(present[:3])}); choose "
                "another output.dir, or output.overwrite=true to add a run's files to it."
            )
        folder = cls(path)
        with storing(path):
            for name in filter(_is_partial, entries):
                _remove(path / name)
        # One that has finished, or that its ledger can continue.
        if overwrite or not (status(path) == "finished" or (path / LEDGER).exists()):
            folder.empty()
        return folder

    @classmethod
    def next_free(cls, path: Path) -> RunFolder:
        """`path`, or the first of `path-2`, `path-3`, ... that is not there yet."""
        number = 1
        while True:
            candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
            with storing(candidate):
                try:
                    candidate.mkdir(parents=True)
                except FileExistsError:
                    number += 1
                    continue
            return cls(candidate)

    def empty(self) -> None:
        """Removes an earlier run's files."""
        with storing(self.path):
            for name in OURS:
                _remove(self.path / name)

    def write(self, name: str, text: str) -> None:
        """Writes a file so that a reader sees all of it or the one before."""
        target = self.path / name
        with storing(target):
            replace_file(target, lambda file: file.write(text.encode()))

    def write_json(self, name: str, data: Any) -> None:
        """The same with plain values; numbers that are not finite become null."""
        self.write(name, json.dumps(plain(data), indent=2, allow_nan=False) + "\n")

    def close(self) -> None:
        """Lets another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_partial(name: str) -> bool:
    """Whether a crash left it behind."""
    return name.startswith(".") and name.endswith(".partial") and name[1:-8] in OURS


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def status(path: Path) -> str | None:
    """What the summary in a run's folder says, or None when there is none to read."""
    try:
        summary = json.loads((path / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return summary.get("status") if isinstance(summary, dict) else None


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How the courses of two resolved recipes differ: `key is A there and B here`, each."""
    there, here = _flat(course(held)), _flat(course(wanted))
    absent = "absent"
    return [
        f"{key} is {there.get(key, absent)} there and {here.get(key, absent)} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key, absent) != here.get(key, absent)
    ]


def course(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved recipe that decides the course of its run."""
    found = {name: value for name, value in resolved.items() if name not in _BESIDE}
    if isinstance(found.get("trainer"), dict):
        # Where weights lie changes no bit of them.
        found["trainer"] = {k: v for k, v in found["trainer"].items() if k != "offload"}
    return found


_BESIDE = ("output", "tracking", "compare")


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    parts = (_flat(part, f"{key}.{name}" if key else str(name)) for name, part in value.items())
    return {name: inner for part in parts for name, inner in part.items()}


def _lock(path: Path) -> int | None:
    """An advisory lock on the folder itself; the system drops it when the process ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    with storing(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UsageError(
                f"another run is writing to {path}; wait for it, or choose another output.dir."
            ) from None
    return handle
