"""Keeps a sink that may fail or hang from ever touching the run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from fwdlearn.sinks import Record, Sink

_WAITING = 1000
_PATIENCE = 15.0
# Seconds between looks at what has come: a record by itself takes several times as long as one
# among others, because what it needs has left the caches, and what a step needs leaves them for it.
_PAUSE = 2.0


class Failed(Exception):
    """What has become of a sink that is elsewhere, to be read after its name."""


class Background:
    """Calls another sink on a thread of its own, every few seconds.

    An exception, too many records that wait or a sink that does not finish in time gives one
    warning; from then on its records are dropped. The thread is a daemon, so it cannot keep the
    process alive.

    Args:
        sink: what to call.
        name: how the warning names it.
        warn: receives the warning.
        patience: seconds to wait for the sink at the end.
    """

    def __init__(
        self, sink: Sink, name: str, warn: Callable[[str], None], patience: float = _PATIENCE
    ) -> None:
        self.sink = sink
        self.name = name
        self.warn = warn
        self.patience = patience
        self._calls: deque[tuple[str, Record]] = deque()
        self._called = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"fwdlearn-{name}", daemon=True)
        self._given_up = False

    def start(self, meta: Record) -> None:
        self._put("start", meta)
        self._called.set()
        self._thread.start()

    def log(self, record: Record) -> None:
        self._put("log", record)

    def finish(self, summary: Record) -> None:
        self._put("finish", summary)
        self._called.set()
        if self._given_up or not self._thread.ident:
            return
        self._thread.join(self.patience)
        if self._thread.is_alive():
            self._give_up(f"did not finish within {self.patience:g} s")

    def _put(self, method: str, record: Record) -> None:
        if self._given_up:
            return
        if len(self._calls) == _WAITING:
            self._give_up(f"is more than {_WAITING} records behind")
        elif len(self._calls) == _WAITING // 2:
            self._called.set()
        self._calls.append((method, dict(record)))

    def _work(self) -> None:
        method = "start"
        while method != "finish" and not self._given_up:
            self._called.wait(_PAUSE)
            self._called.clear()
            while self._calls and not self._given_up:
                method, record = self._calls.popleft()
                try:
                    getattr(self.sink, method)(record)
                except Failed as error:
                    self._give_up(str(error))
                except Exception as error:  # whatever it is, the run goes on
                    self._give_up(f"failed: {type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        if not self._given_up:
            self._given_up = True
            reason = " ".join(why.split())
            self.warn(f"{self.name} {reason}; the run goes on without it (metrics.jsonl has all)")
