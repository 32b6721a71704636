"""A recipe carried out: the folder, the sinks, training, and a summary however it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fwdlearn.errors import FwdlearnError, NonFiniteError, UsageError
from fwdlearn.ledger.journal import LEDGER, RunJournal
from fwdlearn.ledger.records import Ledger
from fwdlearn.recipe.build import Assembly, assemble, device_of
from fwdlearn.recipe.environment import environment
from fwdlearn.recipe.folder import RunFolder, course, differences, status
from fwdlearn.recipe.fork import check_same_parent, parent_of
from fwdlearn.recipe.load import Recipe
from fwdlearn.recipe.rewind import rewind
from fwdlearn.recipe.source import Problem
from fwdlearn.recipe.text import dump, parse
from fwdlearn.recipe.tracking import Apart
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


def train(
    recipe: Recipe,
    console: Console | None = None,
    fork: Path | None = None,
    step: int | None = None,
) -> tuple[dict[str, Any], Path]:
    """Trains, and leaves a folder with everything about the run.

    A folder that holds the run already is gone on with where that run came to; nothing is done
    where it has finished.

    Args:
        recipe: from `load_recipe`.
        console: where progress is shown; nowhere when not given.
        fork: the folder of a run whose state this one begins with, if it has not begun yet.
        step: after which of its steps; the last one when not given, of a run that diverged the
            last good one.

    Returns:
        The content of `summary.json`, and the folder.

    Raises:
        FwdlearnError: as the summary then says, with status `failed`.
        NonFiniteError: the numbers went wrong. The folder has the weights of the last good step,
            the summary its number (`good_step`) and status `diverged`, and the ledger every step.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; the summary has status `interrupted`, the
            weights reached so far are saved, and the run can be gone on with.
    """
    folder = _open(recipe, fork, step)
    run = _Run(recipe, folder, console, fork, step)
    try:
        if status(folder.path) == "finished":
            return run.told(), folder.path
        with stoppable() as stop:
            try:
                return run.carry_out(stop), folder.path
            except NonFiniteError as error:
                raise run.rewound(error) from error
    except BaseException as error:
        run.record_failure(error)
        raise
    finally:
        folder.close()


class _Run:
    """One run under way. It is itself a sink, to know how far training came."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        console: Console | None,
        fork: Path | None = None,
        step: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.fork, self.step = fork, step
        self.folder = folder
        self.console = console
        self.sinks: list[Sink] = []
        self.assembly: Assembly | None = None
        self.journal: RunJournal | None = None
        self.reached: dict[str, Any] = {}
        self.reporting = False
        self.good: dict[str, Any] = {}

    def told(self) -> dict[str, Any]:
        """The summary of a run that has finished already."""
        summary: dict[str, Any] = json.loads((self.folder.path / "summary.json").read_text("utf-8"))
        self.say(f"{self.folder.path} has finished already, after {summary.get('steps')} steps")
        return summary

    def carry_out(self, stop: Stop) -> dict[str, Any]:
        recipe, folder = self.recipe, self.folder
        resolved = recipe.resolved()
        resolved["output"]["dir"] = str(folder.path)
        if not (folder.path / LEDGER).exists():
            # First, because it is what makes a folder that of a run.
            folder.write("resolved.yaml", dump(resolved))
            folder.write("recipe.yaml", recipe.source.text)
        record = environment(device_of(recipe)) | {"overrides": list(recipe.source.overrides)}
        folder.write_json("env.json", record | self._past())
        folder.write_json("summary.json", {"status": "running", "seed": recipe.seed})
        metrics = JsonLines(folder.path / "metrics.jsonl")
        self.sinks = [self, metrics]
        if self.console is not None:
            self.sinks.append(self.console)
        for component in recipe.sinks:
            sink = Apart(component, folder.path, resolved, self.warn)
            self.sinks.append(Background(sink, component.name, self.warn))
        self.assembly = assemble(recipe, self.sinks)
        parent = None
        if self.fork is not None and not (folder.path / LEDGER).exists():
            parent = parent_of(self.fork, self.step, recipe)
            for section in parent.fresh:
                self.say(f"the state of the {section} begins anew: its section has changed")
        self.journal = self.assembly.trainer.journal = RunJournal(
            folder.path,
            course(resolved),
            metrics,
            self.say,
            self.warn,
            recipe.output.snapshot_seconds,
            stop.hold,
            parent,
        )
        # The journal lets it go once it has been taken over.
        del parent
        summary = self.assembly.trainer.train()
        self.journal.close()
        self.save_model()
        folder.write_json("summary.json", summary)
        return dict(summary)

    def rewound(self, error: NonFiniteError) -> NonFiniteError:
        """The error with the way out, once the weights of the last good step are in the folder."""
        path = self.folder.path
        lr = self.recipe.components["optimizer"].settings.get("lr")
        rate = "optimizer.lr=LOWER"
        if isinstance(lr, float):
            rate = f"optimizer.lr={float(f'{lr / 3:.1g}'):g}"
        # The model that went wrong need not be held beside the one that comes back.
        journal, self.assembly, self.journal = self.journal, None, None
        if journal is None or not (path / LEDGER).exists():
            return NonFiniteError(f"{error} No step has been taken; try {rate}.")
        journal.close()
        try:
            step, again = rewind(path, self.recipe.trainer.log_every)
            if again is not None:
                again.save(path / "model")
        except FwdlearnError as other:
            return NonFiniteError(f"{error} Nothing is lost, but the way back failed: {other}")
        self.good = {"status": "diverged", "good_step": step} if again is not None else {}
        where = f"{path / 'model'} holds the weights after step {step}, the last good one"
        if again is None:
            where = f"the last good step is {step} (`fwdlearn replay {path} --step {step}`)"
        onward = f"--fork {path} --step {step}" if step else "output.dir=NEW"
        return NonFiniteError(
            f"{error} Nothing is lost: {where}; go on from there with `fwdlearn train RECIPE "
            f"{rate} {onward}`."
        )

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
            **self.good,
        }
        # The error that is under way tells more than one that follows from it.
        with suppress(FwdlearnError):
            if self.journal is not None:
                self.journal.close()
        # A folder without a recipe is none of a run, and is to stay free for one.
        if (self.folder.path / "resolved.yaml").exists():
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

    def say(self, message: str) -> None:
        if self.console is not None:
            self.console.say(message)

    def warn(self, message: str) -> None:
        if self.console is not None:
            self.console.warn(message)
        else:
            print(f"warning: {message}", file=sys.stderr)

    def _past(self) -> dict[str, Any]:
        """How and when the run started, and when it was gone on with."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            before = json.loads((self.folder.path / "env.json").read_text("utf-8"))
            kept = {name: before[name] for name in ("started", "overrides")}
            return kept | {"continued": [*before.get("continued", []), now]}
        except (OSError, ValueError, KeyError, TypeError):
            return {"started": now}

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


def _open(recipe: Recipe, fork: Path | None, step: int | None) -> RunFolder:
    if fork is None and step is not None:
        raise UsageError("--step says after which step to --fork a run; give both or neither")
    try:
        if recipe.output.dir is None:
            found = _unfinished(recipe, fork, step)
            return found or RunFolder.next_free(Path("runs") / recipe.name)
        path = Path(recipe.output.dir).expanduser()
        folder = RunFolder.named(path, recipe.output.overwrite)
        try:
            if (path / "resolved.yaml").exists():
                _check_same(path, recipe)
            if fork is not None and (path / LEDGER).exists():
                check_same_parent(Ledger(path / LEDGER).header, fork, step, path)
        except BaseException:
            folder.close()
            raise
        return folder
    except UsageError as error:
        raise recipe.error([Problem(("output", "dir"), str(error))]) from error


def _unfinished(recipe: Recipe, fork: Path | None, step: int | None) -> RunFolder | None:
    """The last of the folders that are named after the recipe, if its run is this one."""
    path, number, last = Path("runs") / recipe.name, 1, None
    while path.exists():
        number, last = number + 1, path
        path = path.with_name(f"{recipe.name}-{number}")
    if last is None or not (last / LEDGER).exists() or status(last) == "finished":
        return None
    try:
        same = not differences(_held(last), recipe.resolved())
        if fork is not None:
            check_same_parent(Ledger(last / LEDGER).header, fork, step, last)
        return RunFolder.named(last, overwrite=False) if same else None
    except UsageError:
        return None  # it is going on, or damaged


def _check_same(path: Path, recipe: Recipe) -> None:
    differing = differences(_held(path), recipe.resolved())
    if differing:
        done = "a finished run" if status(path) == "finished" else "a run"
        raise UsageError(
            f"{path} holds {done} of another recipe: {'; '.join(differing)}. Choose another "
            f"output.dir, with --fork {path} to begin where it is, or output.overwrite=true to "
            "replace it."
        )


def _held(path: Path) -> dict[str, Any]:
    """The resolved recipe of the run in a folder."""
    file = path / "resolved.yaml"
    try:
        source, problems = parse(file.read_text("utf-8"), str(file))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    held = source.data
    if problems or not isinstance(held, dict):
        raise UsageError(
            f"{file} is no recipe any more, so what {path} holds is not known; choose another "
            "output.dir, or output.overwrite=true to replace it."
        )
    return held


class Stop:
    """Lets signals wait for the end of what must not be cut in two."""

    def __init__(self) -> None:
        self.holding = False
        self.waiting: int | None = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, a signal is noted; it is raised at the end."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.waiting is not None:
            raise Interrupted(self.waiting)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGHUP raise Interrupted; a second one meets the handlers of before."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        restore()
        if not stop.holding:
            raise Interrupted(number)
        stop.waiting = number

    # One that the parent has set to be ignored, as nohup does, stays so.
    asked = [n for n in _STOPPING if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in asked}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield stop
    finally:
        restore()


_STOPPING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])]
