"""Cotangents by forward mode alone: as many tangents as the thing has numbers a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fwdlearn.moonwalk.chain import Part

# Tangents that are carried at once: more is faster and takes more memory.
_TOGETHER = 16


def output_cotangent(
    losses: Callable[[Tensor], Tensor], output: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of the rows, and the gradient of their weighted sum with respect to the output.

    Exact, for any objective that torch.func.jvp can pass; costs as many evaluations of the
    objective as a row of the output has numbers.

    Args:
        losses: output [rows, ...] -> [rows], each from its own row alone.
        output: [rows, ...].
        weight: [rows].

    Returns:
        Losses [rows], and the cotangent in the shape of the output.
    """
    found = torch.empty_like(output).flatten(1)

    def slope(tangent: Tensor) -> Tensor:
        return torch.func.jvp(losses, (output,), (tangent,))[1]

    for columns, tangents in _basis(output):
        found[:, columns] = (torch.func.vmap(slope)(tangents) * weight).T.to(found.dtype)
    return losses(output), found.view_as(output)


def carried(parts: Sequence[Part], x: Tensor, end: Tensor) -> Tensor:
    """The cotangent at x, from tangents carried from there to the output.

    Args:
        parts: the layers from x to the output.
        x: [rows, *in].
        end: the cotangent of the output.
    """
    found = torch.empty_like(x, dtype=end.dtype).flatten(1)
    for columns, tangents in _basis(x):
        here = x
        for _, layer in parts:
            tangents = layer.jvp(here, tangents)
            here = layer(here)
        found[:, columns] = (tangents * end).flatten(2).sum(2).T
    return found.view_as(x)


def _basis(like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of features, and for each the tangent [rows, ...] that is one there in every row."""
    size = like[0].numel()
    for columns in torch.arange(size, device=like.device).split(_TOGETHER):
        tangents = like.new_zeros(len(columns), len(like), size)
        tangents[torch.arange(len(columns), device=like.device), :, columns] = 1
        yield columns, tangents.view(len(columns), *like.shape)
