"""Modules that learn from their own inputs, beside the gradient.

Such a module has a `share` and a method `learn_from`; nothing registers it. After each update the
trainer shows every one its inputs in a plain pass over the first rows of the batch (batches are
shuffled, so these are a sample of it), in evaluation mode, counted as queries. One that the pass
meets several times, as each step of a recurrent network does, learns once, from all that it met.
What it learns lies in its buffers and is a function of the batches alone.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch


@runtime_checkable
class LearnsLocally(Protocol):
    """A module that changes its buffers by what comes in.

    Attributes:
        share: of the rows of a batch that it wants to see, above 0 and at most 1.
    """

    share: float

    def learn_from(self, inputs: Tensor) -> None:
        """One step of learning, without gradients.

        Args:
            inputs: what `forward` was given, [rows, ...]; of several calls, one after another.
        """


def local_rows(model: nn.Module, rows: int) -> int:
    """How many rows of a batch the modules of a model learn from: queries of a step."""
    shares = [module.share for module in model.modules() if isinstance(module, LearnsLocally)]
    return math.ceil(rows * max(shares, default=0.0))


def learn_locally(model: nn.Module, batch: Batch) -> int:
    """One step of every module that learns by itself.

    Args:
        model: in evaluation mode.
        batch: of which the first rows are shown.

    Returns:
        The queries that it took.
    """
    count = local_rows(model, len(batch))
    if not count:
        return 0

    met: dict[Any, list[Tensor]] = {}

    # Clones, because what comes after may write into its inputs.
    def note(module: Any, args: tuple[Any, ...], output: object) -> None:
        met.setdefault(module, []).append(args[0].clone())

    rows = batch.select(torch.arange(count, device=batch.device))
    with ExitStack() as hooks, torch.inference_mode():
        for module in model.modules():
            if isinstance(module, LearnsLocally):
                hooks.callback(module.register_forward_hook(note).remove)
        model(*rows.args, **rows.kwargs)
        # Not before the pass is over: it is that of the model as it was.
        for module, inputs in met.items():
            alike = all(one.shape[1:] == inputs[0].shape[1:] for one in inputs)
            for seen in [torch.cat(inputs)] if alike else inputs:
                module.learn_from(seen)
    return count
