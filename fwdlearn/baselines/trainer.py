"""The loop in which baselines run: that of all methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from fwdlearn.baselines.oracle import ReverseOracle
from fwdlearn.baselines.ridge import Solved
from fwdlearn.batch import Batch
from fwdlearn.blackbox import BlackBox
from fwdlearn.engine import Choice, Engine
from fwdlearn.engine.offload import Resident
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate
from fwdlearn.keys import Key
from fwdlearn.memory import keep_freed_pages, kept_below
from fwdlearn.trainer import AnyEngine, Trainer


class BaselineTrainer(Trainer):
    """A `Trainer` whose estimator may ask a `GradientOracle`."""

    def _engine(self, model: nn.Module) -> Callable[..., AnyEngine]:
        # A graph spans all steps of a sequence anyway.
        return super()._engine(model) if isinstance(model, BlackBox) else Engine

    def _home(self, offload: str | None) -> Resident:
        if offload is not None:
            raise UsageError(
                f"Trainer(offload=...): {type(self.estimator).__name__} holds a graph of the whole "
                "model, weights and all; leave trainer.offload out, or the baseline "
                "(backprop=false in `fwdlearn compare`)."
            )
        return super()._home(offload)

    def _oracle(self, batch: Batch, dropout: Key | None = None) -> ReverseOracle:
        if not isinstance(self.engine, Engine):
            raise UsageError(
                f"{type(self.estimator).__name__} needs a model that runs here, and a black box "
                "only answers; leave the baseline out (backprop=false in `fwdlearn compare`)."
            )
        return ReverseOracle(self.engine, batch, dropout)

    def _choose(self) -> Choice:
        # Nothing is perturbed, so there is no rung to choose and none to check.
        if self.engine.choice is None:
            if torch.device(self.device).type == "cpu":
                keep_freed_pages(kept_below(self.model))
            self.engine.choice = Choice("baseline", "forward and backward passes")
        return self.engine.choice

    @torch.no_grad()
    def _update(self, estimate: Estimate, names: Iterable[str]) -> dict[str, float]:
        """As a `Trainer` does; values that are solved for are taken as they are."""
        if not isinstance(estimate.grad, Solved):
            return super()._update(estimate, names)
        changes = {}
        for name, value in estimate.grad.items():
            parameter = self.engine.params[name]
            changes[name] = float((value - parameter).square().sum())
            parameter.copy_(value)
        # Nothing has a gradient, so that nothing moves; schedules want to see a step.
        self.optimizer.step()
        return changes
