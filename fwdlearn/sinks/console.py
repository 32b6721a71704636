"""Progress on the terminal: a live display there, plain lines elsewhere."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fwdlearn.sinks import Record

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN_LOSSES = 24


class Screen(RichConsole):
    """A rich console that leaves it to its owner what a closed pipe means; rich would exit."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Console:
    """Shows a run to the person who waits for it.

    On a terminal: a bar, the training loss with its recent course, accuracy when evaluated, the
    signal-to-noise ratio of the estimate, queries per second and the time left; every evaluation
    stays as a line above. Elsewhere: one line a record. A closed pipe silences it.

    Args:
        title: what is being trained.
        console: where to write; standard output when not given.
    """

    def __init__(self, title: str, console: RichConsole | None = None) -> None:
        self.title = title
        self.console = console or Screen(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._closed = False
        self._meta: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._losses: list[float] = []

    def start(self, meta: Record) -> None:
        self._meta = dict(meta)
        parts = [self.title]
        if "parameters" in meta:
            parts.append(f"{meta['parameters']:,} parameters")
        if "rows" in meta:
            parts.append(f"{meta['rows']:,} rows a step")
        if meta.get("rung"):
            parts.append(str(meta["rung"]))
        self._say(Text(" · ".join(parts), style="bold"))
        if self.console.is_terminal:
            self._live = Live(
                self._display(), console=self.console, refresh_per_second=8, transient=True
            )
            self._guard(self._live.start)

    def log(self, record: Record) -> None:
        self._last.update({key: value for key, value in record.items() if value is not None})
        loss = record.get("train.loss")
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        if "engine.rung" in record:
            self.warn(f"now on the {record['engine.rung']} rung: {record['engine.reason']}")
        if "engine.halvings" in record:
            times = record["engine.halvings"]
            self.warn(f"memory ran out: blocks of queries are 1/{2**times} of their size now")
        evaluated = "eval.loss" in record
        if self._live is None and loss is not None:
            self._say(self._line())
        if evaluated:
            self._say(self._evaluation(record))
        if self._live is not None:
            live, display = self._live, self._display()
            self._guard(lambda: live.update(display))

    def finish(self, summary: Record) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            self._guard(live.stop)
        status = str(summary.get("status", "finished"))
        parts = [f"{summary.get('steps', 0):,} steps", f"{summary.get('queries', 0):,} queries"]
        parts.append(f"in {_duration(summary.get('seconds', 0.0))}")
        line = f"{status}: {', '.join(parts[:2])} {parts[2]}"
        if _is_number(summary.get("train.loss")):
            line += f"; training loss {summary['train.loss']:.4f}"
        if _is_number(summary.get("eval.loss")):
            line += f"; evaluation loss {summary['eval.loss']:.4f}"
        line += "".join(f", {figure}" for figure in _figures(summary))
        if _is_number(summary.get("memory.peak_bytes")):
            line += f"; peak memory {summary['memory.peak_bytes'] / 2**20:,.0f} MiB"
        self._say(Text(line, style="bold green" if status == "finished" else "bold yellow"))

    def say(self, message: str) -> None:
        """One line of plain text, with the same care."""
        self._say(Text(message))

    def warn(self, message: str) -> None:
        """One line that does not tear the display."""
        self._say(Text(f"warning: {message}", style="yellow"))

    def _line(self) -> Text:
        parts = [Text(f"step {self._counted()}"), *self._numbers(), Text(self._left())]
        return Text("  ").join(part for part in parts if part)

    def _evaluation(self, record: Record) -> Text:
        text = Text(f"step {self._counted()}  evaluation: loss {record['eval.loss']:.4f}")
        for figure in _figures(record):
            text.append(f"  {figure}", style="bold cyan")
        return text

    def _numbers(self) -> list[Text]:
        last, parts = self._last, []
        if "train.loss" in last:
            parts.append(Text(f"loss {last['train.loss']:.4f}"))
        if "snr" in last:
            parts.append(Text(f"snr {last['snr']:.3g}"))
        if "queries_per_second" in last:
            parts.append(Text(f"{_short(last['queries_per_second'])} queries/s"))
        if last.get("nonfinite"):
            parts.append(Text(f"{last['nonfinite']:,} non-finite", style="yellow"))
        return parts

    def _display(self) -> Group:
        done, total = self._fraction()
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        counts = Text(f"{done / total:4.0%}  {self._counted()}  {self._left()}")
        progress = ProgressBar(total, done, complete_style="cyan", finished_style="green")
        bar.add_row(progress, counts)
        figures = [Text(figure, style="bold cyan") for figure in _figures(self._last)]
        numbers = Text("  ").join([*self._numbers(), *figures])
        if len(self._losses) > 1:
            numbers = Text(f"{_course(self._losses)}  ", style="cyan").append_text(numbers)
        numbers.no_wrap, numbers.overflow = True, "ellipsis"
        return Group(bar, numbers)

    def _fraction(self) -> tuple[float, float]:
        for unit, done in (("steps", "step"), ("queries", "queries")):
            if self._meta.get(unit):
                return min(self._last.get(done, 0), self._meta[unit]), self._meta[unit]
        return 0, 1

    def _counted(self) -> str:
        step = self._last.get("step", 0)
        return f"{step:,}/{self._meta['steps']:,}" if self._meta.get("steps") else f"{step:,}"

    def _left(self) -> str:
        done, total = self._fraction()
        seconds = self._last.get("seconds")
        if not done or seconds is None:
            return ""
        return f"{_duration(seconds * (total - done) / done)} left"

    def _say(self, text: Text) -> None:
        self._guard(lambda: self.console.print(text, soft_wrap=True))

    def _guard(self, write: Any) -> None:
        """Output that nobody reads any more is no reason to stop training."""
        if self._closed:
            return
        try:
            write()
        except (OSError, ValueError):
            self._closed = True


def _course(losses: list[float]) -> str:
    """The recent losses as a line of bars."""
    size = max(1, math.ceil(len(losses) / _SHOWN_LOSSES))
    parts = [losses[first : first + size] for first in range(0, len(losses), size)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _figures(record: Record) -> list[str]:
    """What an evaluation says beside the loss."""
    shown = {"accuracy": "accuracy {:.1%}", "nmse": "NMSE {:.4f}", "bits": "{:.3f} bits a step"}
    values = {text: record.get(f"eval.{name}") for name, text in shown.items()}
    return [text.format(value) for text, value in values.items() if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
