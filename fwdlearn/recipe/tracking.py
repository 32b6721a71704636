"""Sinks of a recipe, each in a process of its own.

On a thread it would take the interpreter from the run, and what it imports memory: of wandb, a
millisecond a record and a hundred megabytes. Records go there as lines of JSON, and what the sink
has to say comes back as such.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fwdlearn.errors import UsageError
from fwdlearn.recipe.component import Component, bind
from fwdlearn.sinks import Record, Sink
from fwdlearn.sinks.background import Failed

# Seconds that the process may still take once the run is over, whether or not that waits.
_LATE = 30.0


class Apart:
    """A sink in a process of its own.

    The process ends when this one does, whatever its end, and gets no signals from the terminal.
    Methods raise `Failed` where something has gone wrong there.

    Args:
        component: the sink.
        folder: the run's.
        config: the resolved recipe.
        warn: told what the sink says.
        late: seconds that the process may last after the run.
    """

    def __init__(
        self,
        component: Component,
        folder: Path,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
        late: float = _LATE,
    ) -> None:
        self.warn = warn
        self._about = {
            "late": late,
            "name": component.name,
            "settings": component.settings,
            "provided": {"folder": str(folder), "config": config, "process": os.getpid()},
        }
        self._failure = ""

    def start(self, meta: Record) -> None:
        """See `Sink.start`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # A buffer has a lock, and a thread that holds it as the interpreter ends is fatal.
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Without a terminal it cannot ask.
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._send(self._about)
        self._send({"start": meta})

    def log(self, record: Record) -> None:
        """See `Sink.log`."""
        self._send({"log": record})

    def finish(self, summary: Record) -> None:
        """See `Sink.finish`; waits for the process to end."""
        self._send({"finish": summary})
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.wait()
        self._listener.join()
        if self._failure or status:
            raise Failed(self._failure or f"its process ended with status {status}")

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        left = json.dumps(message, default=_simple).encode() + b"\n"
        try:
            while left:
                left = left[self._process.stdin.write(left) :]
        except BrokenPipeError:
            status = self._process.wait()
            self._listener.join()
            raise Failed(self._failure or f"its process ended with status {status}") from None

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            self._failure = said.get("failed", self._failure)
            if "warn" in said:
                self.warn(said["warn"])


def _simple(value: Any) -> Any:
    """What JSON has instead of a value that it has not."""
    return value.item() if hasattr(value, "item") else str(value)


def main() -> None:
    """In the process: calls the sink as the lines on the standard input say."""
    # Of its own, so that nothing that is imported reads requests or writes among the answers.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(nothing, standard)

    def say(**what: str) -> None:
        answers.write(json.dumps(what) + "\n")

    about = json.loads(requests.readline())
    lines: SimpleQueue[str] = SimpleQueue()

    def receive() -> None:
        for line in requests:
            lines.put(line)
        # Whatever hangs now, nobody waits for.
        late = threading.Timer(about["late"], os._exit, (1,))
        late.daemon = True
        late.start()
        lines.put("")

    threading.Thread(target=receive, daemon=True).start()
    try:
        sink, method = _made(about, lambda message: say(warn=message)), ""
        while line := lines.get():
            ((method, record),) = json.loads(line).items()
            getattr(sink, method)(record)
        if method != "finish":
            sink.finish({"status": "killed"})
    except Exception as error:  # anyone's sink, which may raise anything
        say(failed=f"failed: {type(error).__name__}: {error}")
        # What is left to be done at the exit may hang as well.
        os._exit(1)


def _made(about: Mapping[str, Any], warn: Callable[[str], None]) -> Sink:
    name = about["name"]
    component, problems = bind("sink", ("tracking", name), name, about["settings"])
    if component is None:
        raise UsageError("; ".join(problem.message for problem in problems))
    given = {**about["provided"], "folder": Path(about["provided"]["folder"]), "warn": warn}
    sink: Sink = component(**given)
    return sink


if __name__ == "__main__":
    main()
