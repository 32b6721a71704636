"""Modules that learn from their own inputs, beside the gradient.

Such a module has a `share` and a method `learn_from`; nothing registers it. After each update the
trainer shows every one its inputs in a plain pass over the first rows of the batch (batches are
shuffled, so these are a sample of it), in evaluation mode, counted as queries. What it learns lies
in its buffers and is a function of the batches alone.
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
        """One step of learning, without gradients. `inputs` is what `forward` was given."""


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

    def taught(module: Any, args: tuple[Any, ...], output: object) -> None:
        # Its output is out already, so the pass is that of the model as it was.
        module.learn_from(args[0])

    rows = batch.select(torch.arange(count, device=batch.device))
    with ExitStack() as hooks, torch.inference_mode():
        for module in model.modules():
            if isinstance(module, LearnsLocally):
                hooks.callback(module.register_forward_hook(taught).remove)
        model(*rows.args, **rows.kwargs)
    return count
