"""What a check measures, and how the results of a suite are kept and shown."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch

from fwdlearn.errors import UsageError

Status = Literal["passed", "failed", "expected", "skipped"]


@dataclass(frozen=True)
class Figure:
    """A measured number and the bound that it must respect.

    Args:
        what: the number in words.
        value: as measured; not-a-number breaks every bound.
        limit: the largest value that passes.
    """

    what: str
    value: float
    limit: float = 0.0

    @property
    def holds(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.what} {self.value:.3g} (at most {self.limit:.3g})"


class NotApplicable(Exception):
    """Raised by a check that has nothing to say about an object, with the reason."""


@dataclass(frozen=True)
class Result:
    """What became of one check on one object.

    Args:
        subject: repr of the object.
        check: its name.
        group: contract, purity, forward only, accounting, metamorphic, statistical or errors.
        status: "expected" is a failure that was announced.
        figure: what was measured; None where the check raised or did not apply.
        message: the figure in words, the exception, or the reason.
        seconds: how long it took.
    """

    subject: str
    check: str
    group: str
    status: Status
    figure: Figure | None
    message: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """The results of a suite, in order. `str(report)` is a table."""

    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed without being expected to, each once."""
        return tuple(dict.fromkeys(r.check for r in self.results if r.status == "failed"))

    def __str__(self) -> str:
        lines: list[str] = []
        width = max((len(result.check) for result in self.results), default=0)
        subject = None
        for result in self.results:
            if result.subject != subject:
                subject = result.subject
                lines += ["", subject] if lines else [subject]
            lines.append(
                f"  {result.status:8}  {result.group:12}  {result.check:{width}}  {result.message}"
            )
        counts = {status: 0 for status in ("passed", "failed", "expected", "skipped")}
        for result in self.results:
            counts[result.status] += 1
        told = [f"{count} {status}" for status, count in counts.items() if count]
        seconds = sum(result.seconds for result in self.results)
        return "\n".join([*lines, "", f"{', '.join(told) or 'nothing checked'}, {seconds:.1f} s"])


C = TypeVar("C")


@dataclass(frozen=True)
class Check(Generic[C]):
    """A named property. `function` takes a case and returns what it measured."""

    name: str
    group: str
    function: Callable[[C], Figure]

    def perform(self, case: C, subject: str, reason: str | None = None) -> Result:
        """Runs it; `reason` says why a failure is expected, if it is."""
        start = time.perf_counter()
        figure: Figure | None = None
        status: Status
        try:
            with own_surroundings():
                figure = self.function(case)
            status, message = ("passed" if figure.holds else "failed"), str(figure)
        except NotApplicable as skip:
            status, message = "skipped", str(skip)
        # Whatever third-party code raises is a finding about it, to be reported with the others.
        except Exception as error:
            status, message = "failed", f"raised {type(error).__name__}: {error}"
        if status == "failed" and reason is not None:
            status, message = "expected", f"{reason}; {message}"
        seconds = time.perf_counter() - start
        return Result(subject, self.name, self.group, status, figure, message, seconds)


@dataclass(frozen=True)
class Suite(Generic[C]):
    """Checks by name, in the order of their definition."""

    checks: dict[str, Check[C]] = field(default_factory=dict)

    def check(self, group: str) -> Callable[[Callable[[C], Figure]], Callable[[C], Figure]]:
        """Adds a function under its own name."""

        def add(function: Callable[[C], Figure]) -> Callable[[C], Figure]:
            self.checks[function.__name__] = Check(function.__name__, group, function)
            return function

        return add

    def expect(self, expected_failures: Mapping[str, str]) -> None:
        """Raises UsageError for names that are no checks."""
        for name in expected_failures:
            if name not in self.checks:
                raise UsageError(
                    f"expected_failures names {name!r}, which is no check; there are "
                    f"{', '.join(self.checks)}."
                )


# An arbitrary state that nobody would set: a check that left a generator in the state that the
# code under test sets would not see it (it happened).
_ODD = 902_107


def disturb(number: int = 0) -> None:
    """Puts torch's, numpy's and Python's global generators in an odd state."""
    # Not torch.manual_seed, which reaches for accelerators too.
    torch.default_generator.manual_seed(_ODD + number)
    np.random.seed(_ODD + number + 1)
    random.seed(_ODD + number + 2)


def generator_states() -> tuple[bytes, Any, Any]:
    """The states of torch's, numpy's and Python's global generators, comparable with ==."""
    kind, words, *rest = np.random.get_state()
    torch_state = torch.get_rng_state().numpy().tobytes()
    return torch_state, (kind, np.asarray(words).tobytes(), *rest), random.getstate()


@contextmanager
def own_surroundings() -> Iterator[None]:
    """An odd state and a single thread inside, the caller's own outside."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    threads = torch.get_num_threads()
    disturb()
    # Tiny tensors: threads would only wait for each other.
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
        torch.set_num_threads(threads)
