"""A frozen recurrent network whose readout is solved for: what recurrence gives without training.

Paper: H. Jaeger, "The echo state approach to analysing and training recurrent neural networks"
(2001). Inputs and recurrent weights stay as they were drawn; the readout is a ridge regression of
the targets on the states, in float64, by sums over batches. A task at which it does well says
nothing of how the recurrent weights of other methods were trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.data.types import DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.models import Recurrent, recurrent
from fwdlearn.models.recurrent import Cell
from fwdlearn.objectives import per_step, step_weights


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
    model: Recurrent, batches: Iterable[Batch], ridges: Sequence[float] = (1e-8, 1e-6, 1e-4, 1e-2)
) -> float:
    """Solves for the readout of a network, in place.

    Numbers are fitted as they are, classes as one-hot vectors. Every fourth batch chooses among the
    ridges, by the squared error; then all batches are fitted.

    Args:
        model: whose `head` is replaced.
        batches: at least four.
        ridges: multiples of the mean square of the states, each positive.

    Returns:
        The ridge chosen.

    Raises:
        UsageError: too few batches.
    """
    classes = model.head.out_features
    sums: list[list[Tensor]] = [[], []]
    count = 0
    for count, batch in enumerate(batches, 1):
        states, wanted = _regression(model, batch, classes)
        products = [states.T @ states, states.T @ wanted, wanted.square().sum()]
        part = 0 if count % 4 else 1
        sums[part] = (
            [a + b for a, b in zip(sums[part], products, strict=True)] if sums[part] else products
        )
    if count < 4:
        raise UsageError(f"fit_readout(batches=...) needs at least four batches, got {count}.")
    fitted, held = sums

    def error(ridge: float) -> float:
        weight = _solution(fitted[0], fitted[1], ridge)
        square = (weight * (held[0] @ weight)).sum() - 2 * (weight * held[1]).sum() + held[2]
        return float(square)

    best = min(ridges, key=error)
    weight = _solution(fitted[0] + held[0], fitted[1] + held[1], best)
    model.head.weight.copy_(weight[:-1].T)
    model.head.bias.copy_(weight[-1])
    return best


def _regression(model: Recurrent, batch: Batch, classes: int) -> tuple[Tensor, Tensor]:
    """States with a one after them, float64 [n, width + 1], and what is wanted, [n, outputs]."""
    seen: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    try:
        model(*batch.args)
    finally:
        hook.remove()
    targets, states = batch.targets, seen[0]
    if per_step(targets):
        mask = step_weights(targets) > 0
        states, targets = states[mask], targets[mask]
    wanted = targets if targets.is_floating_point() else F.one_hot(targets, classes)
    ones = torch.ones_like(states[:, :1])
    return torch.cat((states, ones), 1).double(), wanted.double()


def _solution(square: Tensor, product: Tensor, ridge: float) -> Tensor:
    size = square.diagonal().mean()
    return torch.linalg.solve(square + ridge * size * torch.eye(len(square)).to(square), product)
