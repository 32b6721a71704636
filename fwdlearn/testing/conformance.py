"""The entry points: check a class or an instance, or make pytest tests of many."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fwdlearn.allocator import Allocator
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimator, Traits
from fwdlearn.oracle import require
from fwdlearn.testing.allocator_checks import ALLOCATOR_CHECKS, AllocatorCase
from fwdlearn.testing.estimator_case import ROOT, EstimatorCase
from fwdlearn.testing.estimator_checks import ESTIMATOR_CHECKS
from fwdlearn.testing.estimator_statistics import SMALL
from fwdlearn.testing.problems import Linear
from fwdlearn.testing.report import Check, Report, Suite

if TYPE_CHECKING:
    import pytest


def check_estimator(
    target: type[Estimator] | Estimator, expected_failures: Mapping[str, str] | None = None
) -> Report:
    """Runs every check on an estimator; about three seconds an instance.

    Args:
        target: an instance, or a class, which means all of its `examples()`.
        expected_failures: name of a check -> why it is expected to fail. Such a failure does not
            count against `Report.passed`.

    Raises:
        UsageError: the target is no estimator, or a name is no check.

    Example:
        >>> from fwdlearn.estimators import SPSA
        >>> check_estimator(SPSA(sigma=0.1)).passed
        True
    """
    return _run(_estimator_cases(target), ESTIMATOR_CHECKS, expected_failures or {})


def check_allocator(
    target: type[Allocator] | Allocator, expected_failures: Mapping[str, str] | None = None
) -> Report:
    """Runs every check on an allocator; arguments and errors as `check_estimator`.

    Example:
        >>> from fwdlearn.allocators import Uniform
        >>> check_allocator(Uniform(directions=2)).failed
        ()
    """
    return _run(_allocator_cases(target), ALLOCATOR_CHECKS, expected_failures or {})


def check(target: Any, expected_failures: Mapping[str, str] | None = None) -> Report:
    """`check_estimator` or `check_allocator`, whichever fits.

    Raises:
        UsageError: the target is neither.
    """
    kind = target if isinstance(target, type) else type(target)
    if issubclass(kind, Estimator):
        return check_estimator(target, expected_failures)
    if issubclass(kind, Allocator):
        return check_allocator(target, expected_failures)
    raise UsageError(
        f"there is nothing to check in {_named(target)}: it is neither a "
        "fwdlearn.estimator.Estimator nor a fwdlearn.allocator.Allocator; derive the class from "
        "one of them."
    )


def parametrize_with_checks(
    targets: Iterable[type[Estimator] | Estimator | type[Allocator] | Allocator],
    expected_failures: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """Makes one pytest test of each check on each instance.

    Use it as::

        @parametrize_with_checks([MyEstimator])
        def test_conforms(instance, check):
            check()

    Args:
        targets: instances, or classes, which mean all of their `examples()`.
        expected_failures: name of a check -> reason; those tests become xfail.
    """
    import pytest

    reasons = expected_failures or {}
    params = []
    for target in targets:
        kind = target if isinstance(target, type) else type(target)
        allocates = issubclass(kind, Allocator)
        suite: Suite[Any] = ALLOCATOR_CHECKS if allocates else ESTIMATOR_CHECKS
        cases: list[tuple[Any, Any]] = [
            *(_allocator_cases(target) if allocates else _estimator_cases(target))
        ]
        for instance, case in cases:
            for name, one in suite.checks.items():
                reason = reasons.get(name)
                marks = [] if reason is None else [pytest.mark.xfail(reason=reason)]
                test = pytest.param(
                    instance, _as_test(one, case, instance), id=f"{instance!r}-{name}", marks=marks
                )
                params.append(test)
    return pytest.mark.parametrize(("instance", "check"), params)


def _as_test(check: Check[Any], case: Any, instance: Any) -> Callable[[], None]:
    def test() -> None:
        import pytest

        result = check.perform(case, repr(instance))
        if result.status == "skipped":
            pytest.skip(result.message)
        assert result.status == "passed", f"{instance!r}: {check.name}: {result.message}"

    return test


def _run(
    cases: list[tuple[Any, Any]], suite: Suite[Any], expected_failures: Mapping[str, str]
) -> Report:
    suite.expect(expected_failures)
    results = [
        check.perform(case, repr(instance), expected_failures.get(name))
        for instance, case in cases
        for name, check in suite.checks.items()
    ]
    return Report(tuple(results))


def _estimator_cases(target: Any) -> list[tuple[Any, Any]]:
    found = []
    for instance in _instances(target, Estimator, "check_estimator"):
        traits = getattr(instance, "traits", None)
        if not isinstance(traits, Traits):
            raise UsageError(
                f"{type(instance).__name__}.traits must be a fwdlearn.estimator.Traits, which "
                f"says what the estimator needs and promises, got {traits!r}."
            )
        case = EstimatorCase(instance)
        require(case.oracle(Linear.random(ROOT, 1, SMALL)), traits.needs, type(instance).__name__)
        found.append((instance, case))
    return found


def _allocator_cases(target: Any) -> list[tuple[Any, Any]]:
    instances = _instances(target, Allocator, "check_allocator")
    return [(instance, AllocatorCase(instance)) for instance in instances]


def _instances(target: Any, kind: type[Any], who: str) -> list[Any]:
    if isinstance(target, kind):
        return [target]
    found: Any = target
    base = f"{kind.__module__}.{kind.__name__}"
    if not isinstance(target, type) or not issubclass(target, kind):
        raise UsageError(
            f"{who} needs a subclass of {base} or an instance of one, got {_named(target)}."
        )
    if inspect.isabstract(target):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UsageError(f"{target.__name__} is abstract: it does not define {missing}.")
    instances = list(found.examples())
    if not instances or not all(isinstance(one, target) for one in instances):
        raise UsageError(
            f"{target.__name__}.examples() must return instances of {target.__name__}, the "
            f"default and some unlike it, got {instances!r}."
        )
    return instances


def _named(target: Any) -> str:
    if isinstance(target, type):
        return f"the class {target.__module__}.{target.__qualname__}"
    return f"{target!r} of type {type(target).__name__}"
