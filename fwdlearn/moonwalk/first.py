"""The first phase: cotangents at the input and at a few anchors, and what layers erase.

Three ways to the same numbers. By residuals: a reverse sweep of transposed products over one bit
a unit. By inversion: the same sweep with every input found again from its output. By tangents:
forward mode and nothing else, as many tangents as the input has numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fwdlearn.moonwalk.chain import Part
from fwdlearn.moonwalk.cotangent import carried


@dataclass
class Notes:
    """What the first phase leaves for the second.

    Args:
        anchors: place -> cotangent of the input of layer `place`.
        fragments: place -> what layer `place` erases of the cotangent of its output.
        evaluations: of layers, forward or inverse, each tangent counted as one.
    """

    anchors: dict[int, Tensor] = field(default_factory=dict)
    fragments: dict[int, Any] = field(default_factory=dict)
    evaluations: int = 0


class FirstPhase(Protocol):
    """Runs a part of a chain once to and once fro."""

    def __call__(
        self,
        parts: Sequence[Part],
        x: Tensor,
        end: Callable[[Tensor], Tensor],
        places: Collection[int],
        erasing: Collection[int],
    ) -> Notes:
        """Notes on the layers `parts`.

        Args:
            parts: the layers.
            x: input of the first.
            end: output of the last -> its cotangent.
            places: where anchors are wanted, from 0 (the input) to len(parts) (the output).
            erasing: the layers whose fragments are wanted.
        """


def by_residuals(
    parts: Sequence[Part],
    x: Tensor,
    end: Callable[[Tensor], Tensor],
    places: Collection[int],
    erasing: Collection[int],
) -> Notes:
    """See `FirstPhase`."""
    residuals = []
    for _, layer in parts:
        x, residual = layer.observe(x)
        residuals.append(residual)

    def latest() -> Iterator[Any]:
        while residuals:
            yield residuals.pop()

    return _reverse(parts, end(x), latest(), places, erasing, len(parts))


def by_inversion(
    parts: Sequence[Part],
    x: Tensor,
    end: Callable[[Tensor], Tensor],
    places: Collection[int],
    erasing: Collection[int],
) -> Notes:
    """See `FirstPhase`. Keeps the inputs of layers that cannot be inverted."""
    kept = []
    for _, layer in parts:
        if not layer.invertible:
            kept.append(x)
        x = layer(x)

    def found(y: Tensor) -> Iterator[Any]:
        for _, layer in reversed(parts):
            y = layer.inverse(y) if layer.invertible else kept.pop()
            yield layer.residual(y)

    return _reverse(parts, end(x), found(x), places, erasing, 2 * len(parts))


def by_tangents(
    parts: Sequence[Part],
    x: Tensor,
    end: Callable[[Tensor], Tensor],
    places: Collection[int],
    erasing: Collection[int],
) -> Notes:
    """See `FirstPhase`. Each anchor and each fragment takes tangents of its own."""
    output = x
    for _, layer in parts:
        output = layer(output)
    h, notes = end(output), Notes(evaluations=2 * len(parts))

    def cotangent(place: int, x: Tensor) -> Tensor:
        notes.evaluations += (len(parts) - place) * (1 + x[0].numel())
        return carried(parts[place:], x, h)

    for place, (_, layer) in enumerate(parts):
        if place in places:
            notes.anchors[place] = cotangent(place, x)
        residual, x = layer.residual(x), layer(x)
        if place in erasing:
            # A cotangent of zeros tells whether the layer erases at all.
            kept = layer.fragment(residual, torch.zeros_like(x, dtype=h.dtype))
            if kept is not None:
                kept = layer.fragment(residual, cotangent(place + 1, x))
            notes.fragments[place] = kept
    if len(parts) in places:
        notes.anchors[len(parts)] = h
    return notes


def _reverse(
    parts: Sequence[Part],
    h: Tensor,
    residuals: Iterator[Any],
    places: Collection[int],
    erasing: Collection[int],
    evaluations: int,
) -> Notes:
    notes = Notes(evaluations=evaluations)
    if len(parts) in places:
        notes.anchors[len(parts)] = h
    for place in reversed(range(len(parts))):
        layer, residual = parts[place][1], next(residuals)
        if place in erasing:
            notes.fragments[place] = layer.fragment(residual, h)
        h = layer.vjp(residual, h)
        if place in places:
            notes.anchors[place] = h
    return notes
