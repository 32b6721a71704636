"""Where a run reports to: files, the terminal, wandb, tensorboard.

A sink is any object with these three methods. One that a recipe's `tracking` names is made in a
process of its own, and given `folder`, `config`, `process` and `warn` as far as it takes them:
where the run is, its resolved recipe, the number of its process, and what shows a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

Record = Mapping[str, Any]
"""Flat names -> numbers: `step`, `train.loss`, `snr`, ...; an evaluation adds `eval.loss`, ..."""


@runtime_checkable
class Sink(Protocol):
    """Receives what happens in a run, in order, from the thread that trains."""

    def start(self, meta: Record) -> None:
        """Before the first step.

        Args:
            meta: steps and queries planned, rows of a step, parameters, rung, reason.
        """

    def log(self, record: Record) -> None:
        """Every few steps, and after each evaluation."""

    def finish(self, summary: Record) -> None:
        """After the last step, also when the run failed; `summary["status"]` tells."""
