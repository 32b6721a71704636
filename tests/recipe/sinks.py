"""Sinks for tests, in processes of their own."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwdlearn.sinks import Record


@dataclass
class Notes:
    """Writes down every call; fails, ends its process or hangs where it is told to.

    Args:
        at: a method.
        how: `fails`, `exits`, `hangs` or `speaks`.
    """

    folder: Path
    config: Mapping[str, Any]
    process: int
    warn: Callable[[str], None]
    at: str = ""
    how: str = "fails"

    def _note(self, method: str, record: Record) -> None:
        with (self.folder / "notes.jsonl").open("a") as file:
            file.write(json.dumps([method, record, os.getpid()]) + "\n")
        if method != self.at:
            return
        if self.how == "fails":
            raise RuntimeError("the server\nsays no")
        if self.how == "exits":
            os._exit(3)
        if self.how == "hangs":
            time.sleep(30)
        print("this goes nowhere", flush=True)
        told = {**self.config, "process": self.process, "read": sys.stdin.read()}
        self.warn(json.dumps(told, sort_keys=True))

    def start(self, meta: Record) -> None:
        self._note("start", meta)

    def log(self, record: Record) -> None:
        self._note("log", record)

    def finish(self, summary: Record) -> None:
        self._note("finish", summary)
