"""Noise that is too small for the numbers it is added to: found at the first step, by measuring.

What a perturbation does to a model of short floats is rounded away from some size on, and an
estimate of nothing but zeros looks like one at a minimum. Which size that is depends on every
layer, so it is measured: whether what the model puts out moves at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator

# Mean sizes of differences over sigma, at one sigma and at twice that, that count as the same.
_AGREE = 0.1
_MOST = 100.0


def is_still(estimate: Estimate) -> bool:
    """Whether no query of an estimate moved its loss by a single bit."""
    size = estimate.info.get("coef_abs")
    return size is not None and float(size) == 0


def refuse(estimator: Estimator, run: Callable[[Estimator], Estimate]) -> None:
    """Raises UsageError where an estimator's noise moves nothing that a model puts out.

    One that has no `sigma`, or whose noise moves the output and only the loss stays, is let pass.

    Args:
        estimator: whose estimate is still.
        run: an estimate of the mean of `output_sum`.
    """
    settings = {each.name for each in dataclasses.fields(estimator)}  # type: ignore[arg-type]
    if "sigma" not in settings or not is_still(run(estimator)):
        return
    sigma: float = estimator.sigma  # type: ignore[attr-defined]
    name = type(estimator).__name__

    def size(value: float) -> float:
        made = run(dataclasses.replace(estimator, sigma=value))  # type: ignore[type-var]
        return float(made.info["coef_abs"])

    for larger in _candidates(sigma):
        found = size(larger)
        if found and abs(size(2 * larger) / found - 1) <= _AGREE:
            raise UsageError(
                f"{name}(sigma={sigma:g}) is below the resolution of this model's numbers: no "
                f"query moved its output by a bit; the smallest that does is about {larger:g}."
            )
    raise UsageError(
        f"{name}(sigma={sigma:g}) moves nothing that the model puts out, and neither does any "
        f"other up to {_MOST:g}: its output does not depend on what is perturbed."
    )


def _candidates(sigma: float) -> Iterator[float]:
    """1, 2, 5, 10, 20, ... times a power of ten, above `sigma`."""
    power = -45
    while True:
        for digit in (1, 2, 5):
            value = float(f"{digit}e{power}")
            if value > _MOST:
                return
            if value > sigma:
                yield value
        power += 1
