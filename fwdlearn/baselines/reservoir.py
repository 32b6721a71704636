"""A frozen recurrent network whose readout is solved for: what recurrence gives without training.

Paper: H. Jaeger, "The echo state approach to analysing and training recurrent neural networks"
(2001). Inputs and recurrent weights stay as they were drawn. A task at which it does well says
nothing of how the recurrent weights of other methods were trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fwdlearn.baselines.ridge import RIDGES, RidgeSums
from fwdlearn.batch import Batch
from fwdlearn.data.types import DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.models import Recurrent, recurrent
from fwdlearn.models.recurrent import Cell


def reservoir(
    info: DataInfo, width: int = 64, radius: float = 0.95, scale: float = 0.5, seed: int = 0
) -> Recurrent:
    """An Elman network with tanh whose recurrent weights have a given spectral radius.

    Args:
        info: of the data; kind `sequence`.
        width: units, at least 1.
        radius: largest absolute eigenvalue of the recurrent weights, positive. Below 1 the state
            forgets its beginning.
        scale: input weights are uniform in [-scale, scale].
        seed: of the weights.
    """
    module = recurrent(info, "elman", (width,), seed=seed).module
    assert isinstance(module, Recurrent)
    cell = module.cells[0]
    assert isinstance(cell, Cell)
    with torch.no_grad():
        weight = cell.recurrent.weight
        weight.mul_(radius / torch.linalg.eigvals(weight.double()).abs().max().float())
        cell.recurrent.bias.zero_()
        # Drawn between the bounds of torch's layers, and brought to the bounds asked for.
        for drawn in (cell.input.weight, cell.input.bias):
            drawn.mul_(scale * width**0.5)
    return module


@torch.no_grad()
def fit_readout(
    model: Recurrent, batches: Iterable[Batch], ridges: Sequence[float] = RIDGES
) -> float:
    """Solves for the readout of a network, in place; see `fwdlearn.baselines.ridge`.

    Args:
        model: whose `head` is replaced.
        batches: at least four.
        ridges: multiples of the mean square of the states, each positive.

    Returns:
        The ridge chosen.

    Raises:
        UsageError: too few batches.
    """
    sums, seen = RidgeSums(), list[Tensor]()
    hook = model.head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    try:
        for batch in batches:
            model(*batch.args)
            sums.add(seen.pop(), batch.targets, model.head.out_features)
    finally:
        hook.remove()
    if not sums.held:
        raise UsageError(
            f"fit_readout(batches=...) needs at least four batches, got {sums.batches}."
        )
    weight, bias, best = sums.solved(ridges)
    model.head.weight.copy_(weight)
    model.head.bias.copy_(bias)
    return best
