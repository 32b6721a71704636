"""A recipe carried out: the folder, the sinks, training, and a summary however it ends."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.recipe.build import Assembly, assemble, device_of
from fwdlearn.recipe.environment import environment
from fwdlearn.recipe.folder import RunFolder
from fwdlearn.recipe.load import Recipe
from fwdlearn.recipe.source import Problem
from fwdlearn.recipe.text import dump
from fwdlearn.recipe.weights import save_model
from fwdlearn.sinks import Record, Sink
from fwdlearn.sinks.background import Background
from fwdlearn.sinks.console import Console
from fwdlearn.sinks.jsonl import JsonLines


class Interrupted(BaseException):
    """A signal asked the run to stop.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def train(recipe: Recipe, console: Console | None = None) -> tuple[dict[str, Any], Path]:
    """Trains, and leaves a folder with everything about the run.

    Args:
        recipe: from `load_recipe`.
        console: where progress is shown; nowhere when not given.

    Returns:
        The content of `summary.json`, and the folder.

    Raises:
        FwdlearnError: as the summary then says, with status `failed`.
        Interrupted: SIGINT or SIGTERM came; the summary has status `interrupted`, and the weights
            reached so far are saved.
    """
    folder = _open(recipe)
    run = _Run(recipe, folder, console)
    try:
        with stoppable():
            return run.carry_out(), folder.path
    except BaseException as error:
        run.record_failure(error)
        raise
    finally:
        folder.close()


class _Run:
    """One run under way. It is itself a sink, to know how far training came."""

    def __init__(self, recipe: Recipe, folder: RunFolder, console: Console | None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.console = console
        self.sinks: list[Sink] = []
        self.assembly: Assembly | None = None
        self.reached: dict[str, Any] = {}
        self.reporting = False

    def carry_out(self) -> dict[str, Any]:
        recipe, folder = self.recipe, self.folder
        resolved = recipe.resolved()
        resolved["output"]["dir"] = str(folder.path)
        folder.write("recipe.yaml", recipe.source.text)
        folder.write("resolved.yaml", dump(resolved))
        record = environment(device_of(recipe))
        record["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        folder.write_json("env.json", record | {"overrides": list(recipe.source.overrides)})
        folder.write_json("summary.json", {"status": "running", "seed": recipe.seed})
        self.sinks = [self, JsonLines(folder.path / "metrics.jsonl")]
        if self.console is not None:
            self.sinks.append(self.console)
        for component in recipe.sinks:
            sink = component(folder=folder.path, config=resolved, warn=self.warn)
            self.sinks.append(Background(sink, component.name, self.warn))
        self.assembly = assemble(recipe, self.sinks)
        summary = self.assembly.trainer.train()
        self.save_model()
        folder.write_json("summary.json", summary)
        return dict(summary)

    def record_failure(self, error: BaseException) -> None:
        """Says in the summary, and to the sinks, how the run ended."""
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, FwdlearnError | Interrupted):
            reason = f"{type(error).__name__}: {reason}"
        summary = {
            **self.reached,
            "status": "interrupted" if stopped else "failed",
            "reason": reason,
            "seed": self.recipe.seed,
        }
        # The error that is under way tells more than one that follows from it.
        with suppress(FwdlearnError):
            self.folder.write_json("summary.json", summary)
        if self.reporting:
            for sink in self.sinks:
                with suppress(Exception):
                    sink.finish(summary)
        if stopped and self.reached.get("steps"):
            with suppress(FwdlearnError):
                self.save_model()

    def save_model(self) -> None:
        if self.assembly is None:
            return
        model, built = self.recipe.components["model"], self.assembly.built
        description = {"name": model.name, "target": model.target, "arguments": model.settings}
        save_model(built.module, self.folder.path / "model", description, built.save)

    def warn(self, message: str) -> None:
        if self.console is not None:
            self.console.warn(message)
        else:
            print(f"warning: {message}", file=sys.stderr)

    def start(self, meta: Record) -> None:
        self.reporting = True
        self.reached = {"engine.rung": meta.get("rung"), "engine.reason": meta.get("reason")}

    def log(self, record: Record) -> None:
        kept = {key: record[key] for key in _SUMMARISED if key in record}
        self.reached |= kept
        self.reached["steps"] = record.get("step", self.reached.get("steps", 0))

    def finish(self, summary: Record) -> None:
        self.reporting = False


_SUMMARISED = ("queries", "seconds", "train.loss", "eval.loss", "eval.accuracy")


def _open(recipe: Recipe) -> RunFolder:
    if recipe.output.dir is None:
        return RunFolder.next_free(Path("runs") / recipe.name)
    try:
        return RunFolder.named(Path(recipe.output.dir).expanduser(), recipe.output.overwrite)
    except UsageError as error:
        raise recipe.error([Problem(("output", "dir"), str(error))]) from error


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted; a second one meets the handlers of before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        restore()
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in _STOPPING}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield
    finally:
        restore()


_STOPPING = (signal.SIGINT, signal.SIGTERM)
