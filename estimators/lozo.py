"""Differences along low-rank directions of which one factor stays for a while (LOZO).

Paper: Y. Chen, Y. Zhang, L. Cao, K. Yuan and Z. Wen, "Enhancing zeroth-order fine-tuning for
language models with low-rank structures" (ICLR 2025, arXiv 2410.07698).

Update, for rows b with n_b directions each (B rows), E = U V^T in an m x n matrix, U [m, r] new for
every direction, V [n, r] new every `lazy` steps, vectors perturbed entry by entry:

    grad = 1/B sum_b 1/n_b sum_k  (L_b(theta + sigma E_bk) - L_b(theta)) / sigma * E_bk

Symbols: r `rank`, V `bases` (with 1 / sqrt(r) in it), U what `ShapedDirections` draws.

Its mean, given V, is the smoothed gradient times V V^T: a part of it, in the space that V spans.
Over many V it is the gradient of the smoothed loss; all directions of a step have the same V, so
more of them leave that part of the error. A step moves r m numbers of a matrix and no more:
momentum gathers within a space until it changes.

Matrices with a side of less than 2 r, such as classifiers, get plain directions: of their few rows
nothing is saved, and their inputs should not be shut into r dimensions.

Differs from the paper in: one-sided against the clean loss, or two-sided; many directions a step,
private to a row or shared; V V^T has mean one. The factor V is a function of the key that it was
drawn with, and that key is the state: the release draws it and U from one stream when it measures
and U alone when it moves, so that steps that renew V move along a direction that nobody measured.

Cost a step, n directions a row: n + 1 queries a row, 2 n + 1 two-sided. State: three numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.differences import Differences
from fwdlearn.directions import Directions
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.laws import check_law
from fwdlearn.oracle import LossOracle
from fwdlearn.shaped import ShapedDirections, matrices


@dataclass(frozen=True)
class LOZO(Estimator):
    """Differences along low-rank directions of which one factor stays for a while (LOZO).

    Args:
        sigma: size of the perturbation, positive.
        rank: columns of the factors, at least 1.
        mixed: rank of the part of a direction within the space, or None for numbers of its own in
            every entry of U. With 1, U is a b^T: the same covariance, and queries that cost the
            same however large the space is.
        lazy: steps that the right factor stays, at least 1.
        baseline: "clean" subtracts each row's unperturbed loss, "antithetic" takes both sides.
        law: "rademacher" or "gaussian", of both factors.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> LOZO(baseline="antithetic").traits.queries_per_direction
        2
    """

    sigma: float = 1e-3
    rank: int = 2
    lazy: int = 50
    mixed: int | None = None
    baseline: Literal["clean", "antithetic"] = "clean"
    law: str = "rademacher"

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"LOZO(sigma=...) must be positive, got {self.sigma!r}.")
        if self.rank is None:
            raise ValueError("LOZO(rank=...) must be a positive integer, got None.")
        check_law("LOZO", self.law, self.rank)
        check_law("LOZO", self.law, self.mixed)
        if self.lazy < 1:
            raise ValueError(f"LOZO(lazy=...) must be at least 1, got {self.lazy!r}.")
        if self.baseline not in ("clean", "antithetic"):
            raise ValueError(
                f"LOZO(baseline=...) must be 'clean' or 'antithetic', got {self.baseline!r}."
            )

    @property
    def traits(self) -> Traits:
        each = 2 if self.baseline == "antithetic" else 1
        return Traits(LossOracle, "weights", "biased", each, 1)

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        """See `Estimator.estimate`; the state says which key named V, and for how many steps."""
        start = oracle.queries
        if state is None or state["age"] >= self.lazy:
            own = key.fold("basis")
            state = {"low": own.low, "high": own.high, "age": 0}
        bases = self._bases(Key(state["low"], state["high"]), params)
        mixed = self.mixed
        directions = ShapedDirections(key, params, plan.directions, self.law, mixed, bases=bases)
        clean = oracle.losses(torch.arange(plan.rows, device=plan.row.device))
        asked = Differences("LOZO", self.sigma, self.baseline, clean, plan)
        grad = asked.along(oracle, directions)
        made = Estimate(grad, asked.loss, oracle.queries - start, asked.info, asked.rows)
        return made, {**state, "age": state["age"] + 1}

    def _bases(self, key: Key, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> V [n, rank] over the root of the rank."""
        sides = {
            name: params[name].new_zeros(()).expand(n, self.rank)
            for name, (_, n) in matrices(params, 2 * self.rank).items()
        }
        if not sides:
            return {}
        drawn = Directions(key, sides, 1, self.law, rank=None)
        first = torch.zeros(1, dtype=torch.int64, device=drawn.device)
        return {name: drawn.dense(name, first)[0] * self.rank**-0.5 for name in sides}

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(),
            cls(sigma=0.1, rank=1, lazy=1),
            cls(rank=4, mixed=1),
            cls(sigma=0.02, rank=3, lazy=2, baseline="antithetic", law="gaussian"),
        ]
