"""Backpropagation in the clothes of an estimator: the same loop, batches, masks and optimizer.

Its gradient is that of the mean loss over the batch, all tensors of it alive at once, as reverse
mode leaves them. A row counts `PASSES` queries: one for its forward pass and two for the backward
pass, which is two products for each of the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.engine import Choice, Engine
from fwdlearn.engine.queries import masks
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.memory import keep_freed_pages
from fwdlearn.oracle import LossOracle, ModelOracle
from fwdlearn.trainer import Trainer

PASSES = 3
"""Queries that a row of a backward pass counts."""


@runtime_checkable
class GradientOracle(LossOracle, Protocol):
    """Answers with the gradient itself."""

    def gradient(self) -> tuple[Mapping[str, Tensor], Tensor]:
        """Name -> gradient of the mean loss over the batch, and that loss.

        Counts `PASSES` queries a row.
        """


@dataclass(frozen=True)
class Backpropagation(Estimator):
    """The exact gradient, by reverse mode; one batch's gradient whatever the plan."""

    traits = Traits(GradientOracle, "weights", "gradient", 0, queries_per_row=PASSES)

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        assert isinstance(oracle, GradientOracle)
        start = oracle.queries
        grad, loss = oracle.gradient()
        info = {"variance": torch.zeros(())}
        return Estimate(grad, loss, oracle.queries - start, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


def is_baseline(estimator: Estimator) -> bool:
    """Whether it asks for gradients, so that it needs a `BaselineTrainer`."""
    return GradientOracle in estimator.traits.needs.__mro__


class ReverseOracle(ModelOracle):
    """A `GradientOracle` on a model and a batch. See `ModelOracle` for the arguments."""

    def gradient(self) -> tuple[Mapping[str, Tensor], Tensor]:
        """See `GradientOracle.gradient`.

        Raises:
            UsageError: nothing in the losses depends on a parameter by a derivative.
        """
        engine, batch = self._engine, self._batch
        dropout = self._dropout if engine.model.training else None
        rows = torch.arange(len(batch), device=batch.device)
        with torch.enable_grad(), masks(dropout, rows):
            output = engine.model(*batch.args, **batch.kwargs)
            loss = engine.row_losses(output, batch).mean()
            if not loss.requires_grad:
                raise UsageError(
                    "Backpropagation needs a loss with a derivative, and this model or objective "
                    "cuts it off; leave the baseline out (backprop=false in `fwdlearn compare`)."
                )
            found = torch.autograd.grad(loss, list(engine.params.values()), materialize_grads=True)
        self._queries += PASSES * len(batch)
        return dict(zip(engine.params, found, strict=True)), loss.detach()


class BaselineTrainer(Trainer):
    """A `Trainer` whose estimator may ask a `GradientOracle`."""

    def _oracle(self, batch: Batch, dropout: Key | None = None) -> ReverseOracle:
        if not isinstance(self.engine, Engine):
            raise UsageError(
                "Backpropagation needs a model that runs here, and a black box only answers; leave "
                "the baseline out (backprop=false in `fwdlearn compare`)."
            )
        return ReverseOracle(self.engine, batch, dropout)

    def _choose(self) -> Choice:
        # Nothing is perturbed, so there is no rung to choose and none to check.
        if self.engine.choice is None:
            if torch.device(self.device).type == "cpu":
                keep_freed_pages()
            self.engine.choice = Choice("baseline", "forward and backward passes")
        return self.engine.choice
