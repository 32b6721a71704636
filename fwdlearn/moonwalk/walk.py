"""Moonwalk: exact gradients by inverse-forward differentiation, with anchors and a monitor.

Paper: D. Krylov, A. Karamzade and R. Fox, "Moonwalk: inverse-forward differentiation" (AISTATS
2026, arXiv 2402.14212).

Update, for layers x_l = f_l(x_{l-1}, w_l), A_l = dx_l/dx_{l-1} and cotangents h_l = dJ/dx_l:

    first phase     h_0 (and a few h_l, the anchors)
    second phase    l = 1, 2, ...:  h_l = h_{l-1} A_l^+ ,   dJ/dw_l = h_l dx_l/dw_l

Symbols: x `x`, h `h`, the product with A^T `vjp`, with A^+ `vijp`, anchors `notes.anchors`.

What runs in reverse: the first phase by residuals or by inversion is a reverse sweep for the
cotangents of inputs alone, without any parameter's; the last layer with parameters before an
anchor, and the branches of a coupling, are backpropagated within themselves. All of it by explicit
transposed products on plain tensors: torch's autograd engine is never called and no graph made.

Differs from the paper in: anchors, that is cotangents kept every few layers, since the inverse
products multiply rounding errors by the condition of every layer; the mismatch at an anchor as a
monitor; a stretch that misses its anchor is walked again with twice the anchors, down to single
layers, whose gradient needs no inverse; nested spacings; directions in which a layer is weak may
count as erased (`cutoff`); the first phase by inversion or by pure forward mode.

Cost, in products of one layer (backpropagation takes 3: forward, input, parameters): 5 by
residuals (forward twice, vjp, vijp, parameters), and 2 more for each further spacing; by tangents
2 n_0 and more. Memory beside weights, input and one stretch's gradients: one activation for each
anchor, one bit a unit for leaky ReLUs, fragments, and what one layer needs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.moonwalk.chain import Chain, Part, pull
from fwdlearn.moonwalk.cotangent import output_cotangent
from fwdlearn.moonwalk.first import FirstPhase, by_inversion, by_residuals, by_tangents
from fwdlearn.moonwalk.layer import Layer

_FIRST: dict[str, FirstPhase] = {
    "residuals": by_residuals,
    "inversion": by_inversion,
    "tangents": by_tangents,
}
Named = tuple[str, Tensor]


@dataclass(frozen=True)
class Moonwalk:
    """How to walk.

    Args:
        anchors: a cotangent is kept after every so many layers with trainable parameters (at
            least 1); None keeps none. Several numbers, falling, nest: (16, 4) keeps every
            sixteenth, and every fourth within the stretch being walked, at the price of one more
            forward and reverse sweep.
        tolerance: relative mismatch of cotangents at an anchor above which a stretch is walked
            again; None for eps^(2/3) of the rows' dtype (2e-5 in float32, 4e-11 in float64).
        first: how cotangents are first found.
        dtype: of cotangents, or None for that of the rows. float64 over a float32 network takes
            anchors four times as far apart, at the price of wider products.

    Raises:
        UsageError: a setting is out of range.

    Example:
        >>> from fwdlearn.moonwalk import mlp
        >>> chain, x = mlp(8, 8, 6, 3), torch.ones(5, 8)
        >>> walk = Moonwalk(anchors=2).walk(chain, x, lambda y: y.square().sum(1))
        >>> gradients = dict(walk)
        >>> list(gradients) == [name for name, _ in chain.named_parameters()], walk.drift < 1e-5
        (True, True)
    """

    anchors: int | tuple[int, ...] | None = 4
    tolerance: float | None = None
    first: Literal["residuals", "inversion", "tangents"] = "residuals"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        spacings = self._spacings(1)
        if (
            not spacings
            or min(spacings) < 1
            or any(wide <= near for wide, near in pairwise(spacings))
        ):
            raise UsageError(
                "Moonwalk(anchors=...) must be at least 1, several numbers falling, got "
                f"{self.anchors!r}."
            )
        if self.tolerance is not None and not self.tolerance > 0:
            raise UsageError(f"Moonwalk(tolerance=...) must be positive, got {self.tolerance!r}.")
        if self.first not in _FIRST:
            raise UsageError(
                f"Moonwalk(first=...) must be one of {', '.join(_FIRST)}, got {self.first!r}."
            )

    def walk(
        self,
        chain: Chain,
        x: Tensor,
        losses: Callable[[Tensor], Tensor],
        weight: Tensor | None = None,
    ) -> Walk:
        """The gradient of the weighted sum of losses, streamed.

        Args:
            chain: the model.
            x: [rows, *in], floating.
            losses: output [rows, ...] -> [rows], each from its own row alone.
            weight: [rows], or None for 1 / rows.
        """
        weight = x.new_full((len(x),), 1 / len(x)) if weight is None else weight
        return Walk(self, chain, x, losses, weight)

    def _spacings(self, layers: int) -> tuple[int, ...]:
        if self.anchors is None:
            return (max(layers, 1),)
        return (self.anchors,) if isinstance(self.anchors, int) else self.anchors


class Walk:
    """Iterate once over (parameter name, gradient), in the order of the layers.

    A gradient is final when it comes: its parameter may be updated and the gradient dropped
    before the next is asked for. Frozen parameters are left out.

    Attributes:
        losses: [rows], once iteration has begun.
        drift: the largest mismatch at an anchor among the stretches that were accepted.
        retried: how many stretches missed their anchor and were walked again.
        evaluations: of layers on all rows, both phases, each tangent counted as one.
    """

    def __init__(
        self,
        settings: Moonwalk,
        chain: Chain,
        x: Tensor,
        losses: Callable[[Tensor], Tensor],
        weight: Tensor,
    ) -> None:
        self.losses: Tensor | None = None
        self.drift, self.retried, self.evaluations = 0.0, 0, 0
        self._settings, self._chain, self._x = settings, chain, x
        self._objective, self._weight = losses, weight
        self._first = _FIRST[settings.first]
        self._tolerance = settings.tolerance or torch.finfo(x.dtype).eps ** (2 / 3)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Named]:
        parts = self._chain.parts
        trained = sum(_trained(part) for part in parts)
        if trained:
            spacings = self._settings._spacings(trained)
            yield from self._walk(parts, self._x, self._end, spacings)

    def _end(self, output: Tensor) -> Tensor:
        self.losses, h = output_cotangent(self._objective, output, self._weight)
        return h.to(self._settings.dtype or h.dtype)

    def _walk(
        self,
        parts: Sequence[Part],
        x: Tensor,
        end: Callable[[Tensor], Tensor],
        spacings: Sequence[int],
    ) -> Generator[Named, None, Tensor]:
        """Gradients of the layers `parts`, from their input and the cotangent of their output.

        Returns the output of the last layer with trainable parameters.
        """
        stops, nested = _stops(parts, spacings[0]), len(spacings) > 1
        bounds = list(pairwise([0, *stops]))
        undone = {i for a, b in bounds for i in range(a, a + _undone(parts[a:b])) if not nested}
        notes = self._first(parts, x, end, {0, *stops}, undone)
        self.evaluations += notes.evaluations
        h = notes.anchors.pop(0)
        for start, stop in bounds:
            stretch, goal = parts[start:stop], notes.anchors.pop(stop)
            again: Sequence[int] | None = spacings[1:] or None
            if not nested:
                fragments = [notes.fragments.pop(place, None) for place in range(start, stop)]
                y, found, drift = _stretch(stretch, x, h, goal, fragments)
                self.evaluations += len(stretch)
                # Not a number is a miss too.
                if drift <= self._tolerance:
                    self.drift = max(self.drift, drift)
                    while found:
                        yield found.pop(0)
                    x = y
                else:
                    self.retried += 1
                    again = [sum(map(_trained, stretch)) // 2]
                del y, found, fragments
            if again:
                x = yield from self._walk(stretch, x, _given(goal), again)
            h = goal
        return x


def _stretch(
    parts: Sequence[Part], x: Tensor, h: Tensor, goal: Tensor, fragments: Sequence[Any]
) -> tuple[Tensor, list[Named], float]:
    """From anchor to anchor: the output, the gradients and the mismatch.

    The last layer with parameters is pulled back from the goal, which is exact and cheaper than
    an inverse; the cotangents that come from both sides are compared before it.
    """
    last = _undone(parts)
    found: list[Named] = []
    for (name, layer), fragment in zip(parts[:last], fragments, strict=False):
        x, h, gradients = layer.advance(x, h, fragment)
        found += ((f"{name}.{key}", value) for key, value in gradients.items())
    y, exact, gradients = pull(parts[last:], x, goal)
    found += gradients.items()
    drift = float((h - exact).norm() / exact.norm()) if last else 0.0
    wanted = {f"{name}.{key}" for name, layer in parts for key in _trainable(layer)}
    return y, [(name, value) for name, value in found if name in wanted], drift


def _undone(parts: Sequence[Part]) -> int:
    """How many layers of a stretch are gone through by inverse products: those up to the last
    but one with trainable parameters."""
    return max((i + 1 for i, part in enumerate(parts[:-1]) if _trained(part)), default=0)


def _stops(parts: Sequence[Part], spacing: int) -> list[int]:
    """Places after every `spacing`-th layer with trainable parameters, and after the last."""
    ends = [place + 1 for place, part in enumerate(parts) if _trained(part)]
    stops = ends[spacing - 1 :: spacing]
    return stops if stops[-1:] == ends[-1:] else [*stops, ends[-1]]


def _trainable(layer: Layer) -> list[str]:
    return [name for name, parameter in layer.named_parameters() if parameter.requires_grad]


def _trained(part: Part) -> bool:
    return any(parameter.requires_grad for parameter in part[1].parameters())


def _given(h: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: h
