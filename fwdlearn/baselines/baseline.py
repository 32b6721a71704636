"""What all baselines have in common."""

from __future__ import annotations

from typing import ClassVar

from fwdlearn.estimator import Estimator


class Baseline(Estimator):
    """An estimator that asks for what no forward-only method has; it needs a `BaselineTrainer`.

    Attributes:
        remark: what a reader of a comparison must know of it; follows its name.
    """

    remark: ClassVar[str]


def is_baseline(estimator: Estimator) -> bool:
    """Whether it needs a `BaselineTrainer`."""
    return isinstance(estimator, Baseline)
