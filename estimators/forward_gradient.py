"""Forward gradients: exact slopes along random tangents, put back along the tangents.

Papers: A. Baydin, B. Pearlmutter, D. Syme, F. Wood and P. Torr, "Gradients without
backpropagation" (arXiv 2202.08587), one tangent; K. Flügel et al., "Beyond backpropagation:
optimization with multi-tangent forward gradients" (arXiv 2410.17764), many tangents; D. Silver et
al., "Learning by directional gradient descent" (DODGE, ICLR 2022), L. Fournier et al., "Can forward
gradient match backpropagation?" (arXiv 2306.06968) and M. Xu et al., "FwdLLM" (arXiv 2308.13894),
tangents that are guesses at the gradient.

Update, for rows b with n_b tangents v each (B rows) and their gradients g_b:

    mean:        grad = 1/B sum_b 1/n_b sum_k  (g_b . v_bk) v_bk
    projection:  grad = 1/B sum_b V_b (V_b^T V_b)^-1 V_b^T g_b,   V_b = [v_b1 ... v_bn]

With a guess u, the same for all rows, and P = I - u u^T / |u|^2:

    mean:        grad = 1/B sum_b  (g_b . u) u / |u|^2 + 1/n_b sum_k  (P g_b . v_bk) P v_bk
    projection:  V_b = [u v_b1 ... v_bn]

Symbols: v `directions`, g . v `slopes`, 1 / (B n_b) `plan.weight`, u `guess`, g . u `share`,
u . v `overlap`.

The guess enters as a control variate: its share of the gradient is exact, and the random tangents
estimate the rest. The mean stays the gradient however bad the guess is, because the tangents do not
depend on it; with cosine c between guess and gradient, the variance is 1 - c^2 times what it was.

Differs from the papers in: tangents are private to a row unless the plan shares them; those of
matrices are Rademacher of rank one; a guess is never rescaled by chance, and costs no bias.

Cost: a query, with its slope, for each (row, direction) pair; with a guess one more for each row,
and d numbers for the guess (as many again for a momentum, and once more while it is used). Memory
does not grow with depth: there is no graph. A projection also takes the inner products of the
tangents that a row has, n^2 (m + n') operations for rank one in an m x n' matrix, and a solution of
n equations in float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.given import GivenDirections
from fwdlearn.gradient import DirectionGradient, Summed
from fwdlearn.keys import Key
from fwdlearn.laws import check_law
from fwdlearn.oracle import SlopeOracle, forbid_backward
from fwdlearn.products import along, gram


class Guess(Protocol):
    """Says where the gradient may point: a local loss, a smaller model, anything without backward.

    It may ask the oracle; a callable that does says how much in an attribute `queries_per_row`.
    Its length does not matter, and no parameter need be named that it knows nothing about.
    """

    def __call__(
        self, oracle: SlopeOracle, params: Mapping[str, Tensor], key: Key
    ) -> Mapping[str, Tensor]:
        """Name -> tensor of the parameter's shape. All its randomness comes from `key`."""


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """Exact slopes along random tangents, and along a guess if there is one.

    Args:
        law: "rademacher" or "gaussian".
        rank: of the tangents of matrices (at least 1), or None for independent entries.
        combination: "mean" of the tangents times their slopes: its mean is the gradient, its length
            about sqrt(d / n) times that of the gradient. "projection" of the gradient of a row on
            the span of its tangents: the nearest to the gradient that the slopes allow, shorter
            than it (its mean is about n / d times the gradient). They point the same way unless
            there are nearly as many tangents as numbers in the parameters, d.
        guess: one more tangent. "previous" is the last estimate, "momentum" the decaying mean of
            all estimates so far, in both cases a random tangent at the first step; or a `Guess`.
        decay: of the momentum, in [0, 1).

    Raises:
        ValueError: a setting is out of range.
        UsageError: a `Guess` names an unknown parameter or gives another shape.
        NonFiniteError: most slopes are not finite.

    Example:
        >>> ForwardGradient(guess="momentum").traits.queries_per_row
        1
    """

    law: str = "rademacher"
    rank: int | None = 1
    combination: Literal["mean", "projection"] = "mean"
    guess: Literal["momentum", "previous"] | Guess | None = None
    decay: float = 0.9

    def __post_init__(self) -> None:
        check_law("ForwardGradient", self.law, self.rank)
        if self.combination not in ("mean", "projection"):
            raise ValueError(
                "ForwardGradient(combination=...) must be 'mean' or 'projection', got "
                f"{self.combination!r}."
            )
        if not (self.guess in ("momentum", "previous", None) or callable(self.guess)):
            raise ValueError(
                "ForwardGradient(guess=...) must be 'momentum', 'previous', None or a callable "
                f"(oracle, params, key) -> tensors by name, got {self.guess!r}."
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"ForwardGradient(decay=...) must be in [0, 1), got {self.decay!r}.")

    @property
    def traits(self) -> Traits:
        target: Literal["gradient", "biased"]
        target = "gradient" if self.combination == "mean" else "biased"
        own = 0 if self.guess is None else 1 + int(getattr(self.guess, "queries_per_row", 0))
        return Traits(SlopeOracle, "weights", target, 1, own)

    def estimate(
        self,
        oracle: SlopeOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        """See `Estimator.estimate`; the state is the guess at the next gradient."""
        start = oracle.queries
        directions = Directions(key, params, plan.directions, self.law, self.rank)
        losses, slopes = oracle.slopes(plan.row, directions, plan.direction)
        losses, slopes = losses.double(), slopes.double()
        valid = losses.isfinite() & slopes.isfinite()
        guided = None
        if self.guess is not None:
            guess = self._guess(oracle, params, state, key.fold("guess"))
            guided = _Guided(guess, directions, oracle, plan)
            valid &= guided.share.isfinite()[plan.row]
        weight, nonfinite = plan.finite(valid)
        slopes = torch.where(weight > 0, slopes, 0.0)
        info = {"coef_abs": slopes.abs().mean(), "nonfinite": torch.tensor(nonfinite)}
        grad: Mapping[str, Tensor]
        if self.combination == "projection":
            grad = _projection(directions, plan, weight, slopes, guided)
        else:
            grad, info["variance"] = _mean(directions, plan, weight, slopes, guided)
        loss = (weight * torch.where(weight > 0, losses, 0.0)).sum()
        if isinstance(self.guess, str):
            state = self._remember(state, grad)
        rows = {"square_slope": plan.square_slopes(slopes, weight)}
        return Estimate(grad, loss, oracle.queries - start, info, rows), state

    def _guess(
        self, oracle: SlopeOracle, params: Mapping[str, Tensor], state: Any, key: Key
    ) -> GivenDirections:
        """The guess, as long as a random tangent is on average."""
        values = state
        if callable(self.guess):
            with forbid_backward():
                values = self.guess(oracle, params, key)
        size = sum(value.numel() for value in params.values())
        norm = _norm(values) if values else 0.0
        if not norm:
            # Nothing is known yet: any direction will do, so long as it does not favour one.
            drawn = Directions(key.fold("first"), params, 1, self.law, self.rank)
            first = torch.zeros(1, dtype=torch.int64, device=drawn.device)
            return GivenDirections(params, {name: drawn.dense(name, first) for name in params})
        factor = size**0.5 / norm
        return GivenDirections(params, {n: (v * factor).unsqueeze(0) for n, v in values.items()})

    def _remember(self, state: Any, grad: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if state is None or self.guess == "previous":
            return {name: grad[name].clone() for name in grad}
        return {name: torch.lerp(grad[name], state[name], self.decay) for name in grad}

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(),
            cls(law="gaussian", rank=2),
            cls(rank=None, combination="projection"),
            cls(guess="momentum"),
            cls(law="gaussian", combination="projection", guess="previous"),
        ]


class _Guided:
    """What is known along the guess.

    Attributes:
        share: float64 [rows], each row's slope.
        square: float64 scalar, |u|^2.
        overlap: float64 [directions], inner products with the random tangents.
    """

    def __init__(
        self, guess: GivenDirections, directions: Directions, oracle: SlopeOracle, plan: Plan
    ) -> None:
        rows = torch.arange(plan.rows, device=plan.row.device)
        self.guess = guess
        self.share = oracle.slopes(rows, guess, torch.zeros_like(rows))[1].double()
        self.square = guess.square_norms(rows[:1] * 0)[0]
        self.overlap = along(directions, guess)

    def times(self, coefficient: Tensor) -> DirectionGradient:
        return DirectionGradient(self.guess, coefficient.reshape(1))


def _mean(
    directions: Directions, plan: Plan, weight: Tensor, slopes: Tensor, guided: _Guided | None
) -> tuple[Mapping[str, Tensor], Tensor]:
    """The gradient, and the trace of its covariance."""
    if guided is not None:
        # Those of the part of each row's gradient that the guess leaves over.
        share = torch.where(weight > 0, guided.share[plan.row], 0.0)
        slopes = slopes - share * guided.overlap[plan.direction] / guided.square
    coefficients = slopes.new_zeros(plan.directions)
    coefficients.index_add_(0, plan.direction, torch.where(weight > 0, weight * slopes, 0.0))
    grad = DirectionGradient(directions, coefficients)
    square_norms = grad.square_norms()
    if guided is None:
        return grad, (coefficients.square() * (square_norms - 1)).sum()
    along_guess = ((weight * share).sum() - coefficients @ guided.overlap) / guided.square
    square_norms = square_norms - guided.overlap.square() / guided.square
    variance = (coefficients.square() * (square_norms - 1)).sum()
    return Summed(grad, guided.times(along_guess)), variance


def _projection(
    directions: Directions, plan: Plan, weight: Tensor, slopes: Tensor, guided: _Guided | None
) -> Mapping[str, Tensor]:
    """Each row's gradient on the span of its tangents, and the mean over rows."""
    device, coefficients = slopes.device, slopes.new_zeros(plan.directions)
    along_guess = slopes.new_zeros(())
    for ids, slopes_of in _spans(plan, weight, slopes, guided):
        inner = gram(directions, ids.to(device))
        if guided is not None:
            inner = torch.nn.functional.pad(inner, (1, 0, 1, 0))
            inner[:, 0, 1:] = inner[:, 1:, 0] = guided.overlap[ids]
            inner[:, 0, 0] = guided.square
        # The pseudo-inverse, because tangents may depend on each other where they are many.
        solved = (torch.linalg.pinv(inner, hermitian=True) @ slopes_of.unsqueeze(2)).squeeze(2)
        if guided is not None:
            along_guess = along_guess + solved[:, 0].sum()
            solved = solved[:, 1:]
        coefficients.index_add_(0, ids.flatten().to(device), solved.flatten())
    grad = DirectionGradient(directions, coefficients)
    return grad if guided is None else Summed(grad, guided.times(along_guess))


def _spans(
    plan: Plan, weight: Tensor, slopes: Tensor, guided: _Guided | None
) -> list[tuple[Tensor, Tensor]]:
    """The sets of tangents that rows have, those of one size together.

    Returns:
        For each size n: ids int64 [sets, n]; and summed over the rows of a set, each with its
        weight, their slopes [sets, n] (with a guess [sets, 1 + n], its own first).
    """
    pairs = torch.nonzero(weight > 0).flatten()
    row, number = plan.row[pairs].cpu(), plan.direction[pairs].cpu()
    counts = torch.unique_consecutive(row, return_counts=True)[1].tolist()
    members: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for mine, own in zip(number.split(counts), pairs.split(counts), strict=True):
        members[tuple(mine.tolist())].append(own)
    sizes: dict[int, list[tuple[tuple[int, ...], Tensor]]] = defaultdict(list)
    for ids, parts in members.items():
        own = torch.stack(parts)
        known = slopes[own]
        if guided is not None:
            known = torch.cat((guided.share[plan.row[own[:, :1]]], known), 1)
        # A pair's weight is that of its row over their number.
        sizes[len(ids)].append((ids, (known * weight[own[:, :1]] * len(ids)).sum(0)))
    return [
        (torch.tensor([ids for ids, _ in sets]), torch.stack([known for _, known in sets]))
        for sets in sizes.values()
    ]


def _norm(values: Mapping[str, Tensor]) -> float:
    return float(sum(value.double().square().sum() for value in values.values())) ** 0.5
