"""What baselines ask: gradients by reverse mode, and what comes into the last layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fwdlearn.baselines.backpropagation import PASSES
from fwdlearn.baselines.ridge import Last
from fwdlearn.engine.queries import masks
from fwdlearn.errors import UsageError
from fwdlearn.objectives import at_step, per_step, step_weights
from fwdlearn.oracle import ModelOracle, forbid_backward

_Seen = tuple[Any, Tensor, Tensor]


class ReverseOracle(ModelOracle):
    """A `GradientOracle` and `ReadoutOracle` on a model and a batch; arguments as `ModelOracle`."""

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
        self._queries += PASSES * len(batch) * batch.passes
        return dict(zip(engine.params, grad, strict=True)), total

    def last(self) -> tuple[Last, Tensor]:
        """See `ReadoutOracle.last`.

        Raises:
            UsageError: the model puts out something else than an nn.Linear does, or one whose
                weight is not trained.
        """
        engine, batch = self._engine, self._batch
        names, seen = {id(value): name for name, value in engine.params.items()}, list[_Seen]()

        def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen.append((module, args[0], out))

        with ExitStack() as hooks, forbid_backward():
            for module in engine.model.modules():
                if isinstance(module, nn.Linear):
                    hooks.callback(module.register_forward_hook(note).remove)
            output = engine.model(*batch.args, **batch.kwargs)
            loss = engine.row_losses(output, batch).mean()
        self._queries += len(batch) * batch.passes
        final = getattr(output, "logits", output)
        for layer, inputs, out in seen:
            if out is final and id(layer.weight) in names:
                bias = names.get(id(layer.bias))
                return Last(names[id(layer.weight)], bias, inputs, loss), batch.targets
        raise UsageError(
            "RidgeReadout needs a model that puts out what a trained nn.Linear does, and "
            f"{type(engine.model).__name__} ends otherwise; leave the baseline out."
        )

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
