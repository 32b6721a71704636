"""Backpropagation in the clothes of an estimator: the same loop, batches, masks and optimizer.

Its gradient is that of the mean loss over the batch, all tensors of it alive at once, as reverse
mode leaves them. A row counts `PASSES` queries: one for its forward pass and two for the backward
pass, which is two products for each of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.blackbox import BlackBox
from fwdlearn.engine import Choice, Engine
from fwdlearn.engine.queries import masks
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.memory import keep_freed_pages
from fwdlearn.objectives import at_step, per_step, step_weights
from fwdlearn.oracle import LossOracle, ModelOracle
from fwdlearn.trainer import AnyEngine, Trainer

PASSES = 3
"""Queries that a row of a backward pass counts."""


@runtime_checkable
class GradientOracle(LossOracle, Protocol):
    """Answers with the gradient itself."""

    def gradient(self, every: int | None = None) -> tuple[Mapping[str, Tensor], Tensor]:
        """Name -> gradient of the mean loss over the batch, and that loss.

        Counts `PASSES` queries a row.

        Args:
            every: so many steps of a sequence know of each other; what came before them is a
                constant. None cuts nothing.
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


@dataclass(frozen=True)
class TruncatedBackpropagation(Estimator):
    """Backpropagation through time that is cut every few steps: no credit passes a cut.

    With one step it is what published perturbation rules for recurrent networks were measured
    against. Memory is that of the steps between two cuts.

    Args:
        steps: between cuts, at least 1.

    Raises:
        ValueError: `steps` is out of range.
    """

    steps: int = 1
    traits = Traits(GradientOracle, "weights", "biased", 0, queries_per_row=PASSES)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(
                f"TruncatedBackpropagation(steps=...) must be at least 1, got {self.steps!r}."
            )

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        assert isinstance(oracle, GradientOracle)
        start = oracle.queries
        grad, loss = oracle.gradient(self.steps)
        info = {"variance": torch.zeros(())}
        return Estimate(grad, loss, oracle.queries - start, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(steps=4)]


def is_baseline(estimator: Estimator) -> bool:
    """Whether it asks for gradients, so that it needs a `BaselineTrainer`."""
    return GradientOracle in estimator.traits.needs.__mro__


class ReverseOracle(ModelOracle):
    """A `GradientOracle` on a model and a batch. See `ModelOracle` for the arguments."""

    def gradient(self, every: int | None = None) -> tuple[Mapping[str, Tensor], Tensor]:
        """See `GradientOracle.gradient`.

        Raises:
            UsageError: nothing in the losses depends on a parameter by a derivative, or sequences
                are to be cut that the model does not go through step by step.
        """
        engine, batch = self._engine, self._batch
        dropout = self._dropout if engine.model.training else None
        rows = torch.arange(len(batch), device=batch.device)
        total, grad = torch.zeros((), device=batch.device), list[Tensor]()
        with torch.enable_grad(), masks(dropout, rows):
            for loss in self._whole() if every is None else self._pieces(every):
                total = total + loss.detach()
                if not loss.requires_grad:
                    continue
                found = torch.autograd.grad(
                    loss, list(engine.params.values()), materialize_grads=True
                )
                pairs = zip(grad or found, found, strict=True)
                grad = [a + b for a, b in pairs] if grad else list(found)
        if not grad:
            raise UsageError(
                "Backpropagation needs a loss with a derivative, and this model or objective "
                "cuts it off; leave the baseline out (backprop=false in `fwdlearn compare`)."
            )
        self._queries += PASSES * len(batch)
        return dict(zip(engine.params, grad, strict=True)), total

    def _whole(self) -> Iterator[Tensor]:
        batch, engine = self._batch, self._engine
        yield engine.row_losses(engine.model(*batch.args, **batch.kwargs), batch).mean()

    def _pieces(self, every: int) -> Iterator[Tensor]:
        """The losses of pieces of a sequence, each with a graph of its own."""
        model: Any = self._engine.model
        targets, inputs = self._batch.targets, self._batch.args
        if not callable(getattr(model, "step", None)) or len(inputs) != 1:
            raise UsageError(
                "TruncatedBackpropagation needs a model that goes through one sequence step by "
                f"step, with methods initial and step, and {type(model).__name__} does not; use "
                "models.recurrent, or Backpropagation, which cuts nothing."
            )
        each, rows = per_step(targets), len(self._batch)
        weights = step_weights(targets) if each else targets.new_ones(rows, 1).float()
        state, steps = model.initial(rows), inputs[0].unbind(1)
        for begin in range(0, len(steps), every):
            state, losses = {name: value.detach() for name, value in state.items()}, []
            for t in range(begin, min(begin + every, len(steps))):
                out, state = model.step(steps[t], state)
                if each or t == len(steps) - 1:
                    wanted, weight = (
                        (targets[:, t], weights[:, t]) if each else (targets, weights[:, 0])
                    )
                    losses.append(at_step(self._engine.objective, out, wanted, weight))
            if losses:
                yield torch.stack(losses).sum(0).mean()


class BaselineTrainer(Trainer):
    """A `Trainer` whose estimator may ask a `GradientOracle`."""

    def _engine(self, model: nn.Module) -> Callable[..., AnyEngine]:
        # A graph spans all steps of a sequence anyway.
        return super()._engine(model) if isinstance(model, BlackBox) else Engine

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
