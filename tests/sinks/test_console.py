"""What the terminal shows, and what a pipe gets."""

from __future__ import annotations

import io
import math

from rich.console import Console as RichConsole

from fwdlearn.sinks.console import Console, Screen, _course, _duration, _short

META = {"steps": 1500, "queries": 864_000, "rows": 64, "parameters": 6570, "rung": "fold"}
RECORD = {
    "step": 300,
    "queries": 172_800,
    "seconds": 3.0,
    "train.loss": 2.25,
    "snr": 0.0123,
    "queries_per_second": 57_600.0,
    "nonfinite": 0,
}
SUMMARY = {
    "status": "finished",
    "steps": 1500,
    "queries": 864_000,
    "seconds": 15.2,
    "train.loss": 0.5,
    "eval.loss": 0.6,
    "eval.accuracy": 0.912,
    "memory.peak_bytes": 400 * 2**20,
}


def _show(terminal: bool, width: int = 80) -> str:
    stream = io.StringIO()
    rich = RichConsole(
        file=stream, force_terminal=terminal, width=width, highlight=False, soft_wrap=True
    )
    console = Console("quickstart", rich)
    console.start(META)
    console.log(RECORD)
    console.warn("wandb failed")
    console.log({"step": 300, "eval.loss": 2.2, "eval.accuracy": 0.5})
    console.log({**RECORD, "step": 600, "train.loss": 1.5, "nonfinite": 3})
    console.finish(SUMMARY)
    return stream.getvalue()


def test_lines_in_a_pipe() -> None:
    assert _show(terminal=False).splitlines() == [
        "quickstart · 6,570 parameters · 64 rows a step · fold",
        "step 300/1,500  loss 2.2500  snr 0.0123  57.6k queries/s  0:12 left",
        "warning: wandb failed",
        "step 300/1,500  evaluation: loss 2.2000  accuracy 50.0%",
        "step 600/1,500  loss 1.5000  snr 0.0123  57.6k queries/s  3 non-finite  0:04 left",
        "finished: 1,500 steps, 864,000 queries in 0:15; training loss 0.5000; evaluation loss "
        "0.6000, accuracy 91.2%; peak memory 400 MiB",
    ]


def test_a_terminal_sees_a_bar_and_the_course_of_the_loss() -> None:
    shown = _show(terminal=True)
    assert "━" in shown
    assert "█▁" in shown
    assert "accuracy 50.0%" in shown
    assert shown.count("evaluation: loss") == 1


def test_a_narrow_terminal() -> None:
    assert "finished" in _show(terminal=True, width=20)


class _Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_closed_pipe_is_no_reason_to_stop() -> None:
    for terminal in (False, True):
        console = Console("x", Screen(file=_Closed(), force_terminal=terminal))
        console.start(META)
        console.log(RECORD)
        console.finish(SUMMARY)


def test_values_that_are_absent_or_not_finite() -> None:
    stream = io.StringIO()
    console = Console("x", RichConsole(file=stream))
    console.start({})
    console.log({"step": 1, "train.loss": math.nan, "snr": None, "queries_per_second": None})
    console.finish({"status": "failed", "train.loss": None})
    assert "failed" in stream.getvalue()


def test_formats() -> None:
    assert (_short(12), _short(57_600), _short(2.5e6)) == ("12", "57.6k", "2.5M")
    assert (_duration(61), _duration(3725)) == ("1:01", "1:02:05")
    assert _course([1.0, 1.0]) == "▁▁"
    assert len(_course([float(i) for i in range(1000)])) <= 24
