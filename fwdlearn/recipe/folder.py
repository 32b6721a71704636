"""The folder of a run: which one, what may be replaced, and writes that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fwdlearn.errors import StorageError, UsageError
from fwdlearn.sinks.jsonl import plain

OURS = (
    "recipe.yaml resolved.yaml env.json metrics.jsonl summary.json model tensorboard wandb".split()
)
"""Everything that a run writes; nothing else in a folder is ever touched."""


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
        """The folder that the user named, emptied of an earlier run's files.

        Raises:
            UsageError: it holds something else, a finished run, or a run that is going on.
            StorageError: it cannot be made or emptied.
        """
        with storing(path):
            path.mkdir(parents=True, exist_ok=True)
            present = sorted(entry.name for entry in path.iterdir())
        if present and not (path / "resolved.yaml").exists() and not overwrite:
            raise UsageError(
                f"{path} is not empty and holds no run (it has {', '.join(present[:3])}); choose "
                "another output.dir, or output.overwrite=true to add a run's files to it."
            )
        folder = cls(path)
        if status(path) == "finished" and not overwrite:
            folder.close()
            raise UsageError(
                f"{path} holds a finished run; choose another output.dir, or "
                "output.overwrite=true to replace it."
            )
        with storing(path):
            for name in OURS:
                old = path / name
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)
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

    def write(self, name: str, text: str) -> None:
        """Writes a file so that a reader sees all of it or the one before."""
        target = self.path / name
        with storing(target):
            partial = self.path / f".{name}.partial"
            try:
                with partial.open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def write_json(self, name: str, data: Any) -> None:
        """The same with plain values; numbers that are not finite become null."""
        self.write(name, json.dumps(plain(data), indent=2, allow_nan=False) + "\n")

    def close(self) -> None:
        """Lets another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def status(path: Path) -> str | None:
    """What the summary in a run's folder says, or None when there is none to read."""
    try:
        summary = json.loads((path / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return summary.get("status") if isinstance(summary, dict) else None


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Inside, errors of the file system become StorageErrors about `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; free some space or choose "
            "another folder with output.dir=DIR"
        ) from error


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
