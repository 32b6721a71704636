"""Sinks that fail, hang or fall behind never reach the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from fwdlearn.sinks import Record
from fwdlearn.sinks.background import Background


class Memory:
    """Remembers its calls; fails or hangs where it is told to."""

    def __init__(self, fails: str = "", hangs: str = "") -> None:
        self.fails, self.hangs = fails, hangs
        self.calls: list[tuple[str, dict[str, object]]] = []
        self.released = threading.Event()

    def _call(self, method: str, record: Record) -> None:
        if self.hangs == method:
            self.released.wait(30)
        if self.fails == method:
            raise RuntimeError("the server\nsays no")
        self.calls.append((method, dict(record)))

    def start(self, meta: Record) -> None:
        self._call("start", meta)

    def log(self, record: Record) -> None:
        self._call("log", record)

    def finish(self, summary: Record) -> None:
        self._call("finish", summary)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    yield []


def _run(sink: Memory, warnings: list[str], records: int = 3) -> float:
    begun = time.monotonic()
    background = Background(sink, "wandb", warnings.append, patience=0.3)
    background.start({"steps": records})
    for step in range(records):
        background.log({"step": step})
    background.finish({"status": "finished"})
    sink.released.set()
    return time.monotonic() - begun


def test_everything_arrives_in_order(warnings: list[str]) -> None:
    sink = Memory()
    _run(sink, warnings)
    assert [method for method, _ in sink.calls] == ["start", "log", "log", "log", "finish"]
    assert [record["step"] for _, record in sink.calls[1:4]] == [0, 1, 2]
    assert warnings == []


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_failure_is_one_warning(method: str, warnings: list[str]) -> None:
    _run(Memory(fails=method), warnings)
    assert warnings == [
        "wandb failed: RuntimeError: the server says no; the run goes on without it "
        "(metrics.jsonl has all)"
    ]


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_hang_is_one_warning(method: str, warnings: list[str]) -> None:
    assert _run(Memory(hangs=method), warnings) < 5
    assert len(warnings) == 1
    assert "did not finish within 0.3 s" in warnings[0]


def test_falling_behind_is_one_warning(warnings: list[str]) -> None:
    assert _run(Memory(hangs="start"), warnings, records=5000) < 5
    assert warnings == [
        "wandb is more than 1000 records behind; the run goes on without it (metrics.jsonl has all)"
    ]
