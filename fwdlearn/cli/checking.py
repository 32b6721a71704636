"""`fwdlearn check`: the conformance suite, without pytest."""

from __future__ import annotations

import inspect

from fwdlearn.errors import UsageError
from fwdlearn.registry import entries, load, suggest, target_of


def check(target: str) -> bool:
    """Examines an estimator or allocator and prints the report.

    Args:
        target: a registered name, or `module:attribute` (a class or an instance).

    Returns:
        Whether it passed.
    """
    subject = load(_target(target))

    from fwdlearn.allocator import Allocator
    from fwdlearn.estimator import Estimator
    from fwdlearn.testing import check_allocator, check_estimator

    kind = subject if inspect.isclass(subject) else type(subject)
    if issubclass(kind, Estimator):
        report = check_estimator(subject)
    elif issubclass(kind, Allocator):
        report = check_allocator(subject)
    else:
        raise UsageError(
            f"{target} is {kind.__name__}, neither an Estimator nor an Allocator; derive it from "
            "fwdlearn.estimator.Estimator or fwdlearn.allocator.Allocator."
        )
    print(report)
    return bool(report.passed)


def _target(name: str) -> str:
    if ":" in name or name in entries("estimator"):
        return target_of("estimator", name)
    if name in entries("allocator"):
        return target_of("allocator", name)
    known = [*entries("estimator"), *entries("allocator")]
    raise UsageError(f"unknown estimator or allocator {name!r}; {suggest(name, known)}")
