"""Backpropagation through a chain at its leanest: what Moonwalk is measured against.

Leaky ReLUs overwrite their input, so that one activation a layer is kept and not two, and every
gradient is dropped as soon as it is final. Beside it gradient checkpointing, and reversal: where
every layer has an inverse, its input is found again on the way back (RevNet).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fwdlearn.moonwalk import Chain, Coupling, Layer, LeakyReLU, output_cotangent

Losses = Callable[[Tensor], Tensor]


def prepared(chain: Chain) -> Chain:
    """Each gradient goes as soon as it is there."""
    for parameter in chain.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return chain


def backpropagate(chain: Chain, x: Tensor, losses: Losses, segment: float | None = None) -> None:
    """One gradient of the mean loss.

    Args:
        chain: from `prepared`.
        x: [rows, *in].
        losses: output -> [rows].
        segment: None to keep every activation, or the length of the segments between checkpoints
            in square roots of the depth.
    """
    parts = _blocks(chain)
    size = len(parts) if segment is None else max(1, round(segment * math.sqrt(len(parts))))
    for start in range(0, len(parts), size):
        layers = [layer for part in parts[start : start + size] for layer in part]
        if segment is None:
            x = _run(layers, x)
        else:
            x = checkpoint(_run, layers, x, use_reentrant=False)
    losses(x).mean().backward()


@torch.no_grad()
def reverse(chain: Chain, x: Tensor, losses: Losses) -> None:
    """One gradient of the mean loss by reversal; inputs of layers without an inverse are kept."""
    kept = []
    for _, layer in chain.parts:
        if not layer.invertible:
            kept.append(x)
        x = layer(x)
    h = output_cotangent(losses, x, x.new_full((len(x),), 1 / len(x)))[1]
    for _, layer in reversed(chain.parts):
        x = layer.inverse(x) if layer.invertible else kept.pop()
        h, gradients = layer.back(x, h)
        del gradients


def _blocks(chain: Chain) -> list[list[Layer]]:
    """Layers with parameters, each with those without that follow it."""
    found: list[list[Layer]] = []
    for _, layer in chain.parts:
        if any(True for _ in layer.parameters()):
            found.append([])
        found[-1].append(layer)
    return found


def _run(layers: list[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = _lean(layer, x)
    return x


def _lean(layer: Layer, x: Tensor) -> Tensor:
    if isinstance(layer, LeakyReLU):
        return F.leaky_relu_(x, layer.slope)
    if isinstance(layer, Chain):
        return _run([part for _, part in layer.parts], x)
    if isinstance(layer, Coupling):
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + _lean(layer.f, x2)
        return torch.cat([y1, x2 + _lean(layer.g, y1)], 1)
    return layer(x)
