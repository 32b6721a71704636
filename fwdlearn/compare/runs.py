"""Every method trained, each run in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fwdlearn.compare.methods import Comparison, Method
from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.recipe.environment import cpus
from fwdlearn.recipe.folder import status
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.run import Interrupted, stoppable, train
from fwdlearn.recipe.text import parse


@dataclass(frozen=True)
class Run:
    """One run of a method.

    Args:
        method: what trains.
        recipe: the file that holds the method's recipe.
        lr: learning rate, or None for the method's own.
        seed: of the run.
        folder: where it goes.
    """

    method: Method
    recipe: Path
    lr: float | None
    seed: int
    folder: Path

    @property
    def words(self) -> list[str]:
        """What differs from the method's recipe."""
        rate = [] if self.lr is None else [f"optimizer.lr={self.lr}"]
        place = [f"output.dir={json.dumps(str(self.folder))}", "output.overwrite=true"]
        return [*rate, f"seed={self.seed}", *place]

    def is_done(self, overwrite: bool) -> bool:
        """Whether it has finished.

        Args:
            overwrite: a finished run of other settings does not count, and is replaced.

        Raises:
            UsageError: the folder holds a finished run of other settings.
        """
        if status(self.folder) != "finished":
            return False
        held = parse((self.folder / "resolved.yaml").read_text("utf-8"), "")[0].data
        wanted = self.method.recipe.resolved() | {"seed": self.seed}
        if self.lr is not None:
            wanted["optimizer"] |= {"lr": self.lr}
        if {**held, "output": None} == {**wanted, "output": None}:
            return True
        if overwrite:
            return False
        raise UsageError(
            f"{self.folder} holds a finished run of other settings; choose another output.dir, or "
            "output.overwrite=true to replace it."
        )


@dataclass(frozen=True)
class Failure:
    """How a run ended that did not finish."""

    exit_code: int
    reason: str


def runs(comparison: Comparison, folder: Path) -> list[Run]:
    """All runs, one seed of every method after the other."""
    return [
        Run(method, recipe_of(method, folder), lr, seed, folder / "runs" / _name(method, lr, seed))
        for seed in comparison.recipe.compare.seeds
        for method in comparison.methods
        for lr in comparison.lrs
    ]


def carry_out(
    todo: Sequence[Run],
    jobs: int,
    failures: dict[Path, Failure],
    tell: Callable[[Run, Failure | None], None],
) -> None:
    """Trains. A run that fails stops no other.

    Args:
        todo: what is not done yet.
        jobs: how many run at a time, each with its share of the processors.
        failures: is filled: folder of a run -> how it failed.
        tell: told of every run when it has ended.

    Raises:
        Interrupted: SIGINT or SIGTERM came; what was under way has been stopped.
    """
    threads = torch.get_num_threads() if jobs == 1 else max(1, cpus() // jobs)
    waiting = list(reversed(todo))
    with stoppable(), _stopping() as under_way:
        while waiting or under_way:
            while waiting and len(under_way) < jobs:
                _start(waiting.pop(), threads, under_way)
            for reply in wait(list(under_way)):
                assert isinstance(reply, Connection)
                run, process = under_way.pop(reply)
                failure = _ended(reply, process)
                if failure is not None:
                    failures[run.folder] = failure
                tell(run, failure)


_UnderWay = dict[Connection, tuple[Run, BaseProcess]]


def _start(run: Run, threads: int, under_way: _UnderWay) -> None:
    # A server that has imported everything and done nothing else forks a process for each run.
    servers = [name for name in multiprocessing.get_all_start_methods() if name == "forkserver"]
    context: Any = multiprocessing.get_context(servers[0] if servers else "spawn")
    if servers:
        context.set_forkserver_preload([__name__, "torch._dynamo"])
    reply, theirs = context.Pipe(duplex=False)
    words = (str(run.recipe), run.words, os.getcwd(), threads, theirs)
    process = context.Process(target=_train, args=words)
    process.start()
    theirs.close()
    under_way[reply] = (run, process)


def _train(recipe: str, words: list[str], cwd: str, threads: int, reply: Connection) -> None:
    os.chdir(cwd)
    torch.set_num_threads(threads)
    try:
        train(load_recipe(recipe, words))
        reply.send(None)
    except (Exception, Interrupted) as error:
        reply.send(_failure(error))


def _failure(error: BaseException) -> Failure:
    text = " ".join(str(error).split())
    if isinstance(error, FwdlearnError | Interrupted):
        return Failure(error.exit_code, text)
    return Failure(1, f"{type(error).__name__}: {text}")


def _ended(reply: Connection, process: BaseProcess) -> Failure | None:
    try:
        failure: Failure | None = reply.recv()
        process.join()
        return failure
    except EOFError:
        process.join()
        return Failure(
            1, f"its process ended without a word, exit status {process.exitcode}; out of memory?"
        )
    finally:
        reply.close()


@contextmanager
def _stopping() -> Iterator[_UnderWay]:
    """What is under way when the block is left is asked to stop, and waited for."""
    under_way: _UnderWay = {}
    try:
        yield under_way
    finally:
        for _, process in under_way.values():
            process.terminate()
        for _, process in under_way.values():
            process.join()


def recipe_of(method: Method, folder: Path) -> Path:
    """Where a method's recipe stands."""
    return folder / f"recipe-{_plain(method.label)}.yaml"


def _name(method: Method, lr: float | None, seed: int) -> str:
    rate = "" if lr is None else f"-lr-{lr:g}"
    return f"{_plain(method.label)}{rate}-seed-{seed}"


def _plain(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=,-]+", "-", label).strip("-.") or "method"
