"""`metrics.jsonl`: one JSON object a line, complete after every record."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from fwdlearn.errors import StorageError
from fwdlearn.sinks import Record


class JsonLines:
    """Writes records to a file, each line flushed at once.

    Numbers that are not finite become null, because JSON has no others.

    Args:
        path: the file; replaced when the run starts.

    Attributes:
        keep: bytes at its start to keep instead, of a run that goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keep = 0
        self._file: TextIO | None = None

    def start(self, meta: Record) -> None:
        try:
            if self.path.is_file() and self.path.stat().st_size > self.keep:
                os.truncate(self.path, self.keep)
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from error

    def sync(self) -> int:
        """Makes the records durable; returns how many bytes they are."""
        if self._file is None:
            return self.keep
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._failure(error) from error

    def log(self, record: Record) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(plain(record), allow_nan=False) + "\n")
        except OSError as error:
            raise self._failure(error) from error

    def finish(self, summary: Record) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path}: cannot be written: {error.strerror}; free some space or choose another "
            "folder with output.dir=DIR"
        )


def plain(value: Any) -> Any:
    """The value with tensors as numbers and non-finite numbers as None."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if not isinstance(value, float):
        if not hasattr(value, "item"):
            return str(value)
        value = value.item()
    return value if not isinstance(value, float) or math.isfinite(value) else None
