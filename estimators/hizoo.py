"""Differences along directions that are short where the loss is curved (HiZOO), by tensor.

Paper: Y. Zhao et al., "Second-order fine-tuning without pain for LLMs: a Hessian informed
zeroth-order optimizer" (ICLR 2025, arXiv 2402.15173).

Update, for rows b with n_b directions z each (B rows), and a size s_t for each tensor t:

    h_t  = mean over rows of (L(theta + sigma z_t) - 2 L(theta) + L(theta - sigma z_t))
           / (sigma^2 d_t)                        z_t in tensor t alone, d_t its numbers
    s_t  = sqrt(h / |h_t|), h the geometric mean of all |h_t|; s_t^2 within 1 / limit and limit
    grad = 1/B sum_b 1/n_b sum_k  (L_b(theta + sigma s z_bk) - L_b(theta)) / sigma * s z_bk

Symbols: s `sizes`, h_t `curvature`: an estimate of the mean of the Hessian's diagonal over the
tensor, exact in the mean, kept as a running mean by `memory`. The mean of `grad` is s_t^2 times the
gradient of the loss smoothed by s z, tensor by tensor: a step of gradient descent with it is one
of a diagonal Newton method, with one number a tensor.

Differs from the paper in: one number a tensor in place of one a weight, which would double memory;
curvature is measured in one tensor after the other, `probes` a step, because along a direction of
random signs in all of them the second difference tells nothing of which one is curved; a step
perturbs and updates with the same sizes, those known before it. The passes for curvature count.

Cost a step, n directions a row: n + 1 + 2 probes queries a row. State: two numbers a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.differences import Differences
from fwdlearn.directions import Directions
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.oracle import LossOracle
from fwdlearn.shaped import ShapedDirections


@dataclass(frozen=True)
class HiZOO(Estimator):
    """Differences along directions that are short where the loss is curved (HiZOO), by tensor.

    Args:
        sigma: size of the perturbation, positive. Second differences are of order sigma^2: in
            float32 it should not be below 1e-3.
        probes: tensors whose curvature a step measures, at least 1.
        memory: of the running means, in [0, 1).
        limit: of the squared sizes, at least 1.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> HiZOO(probes=2).traits.queries_per_row
        5
    """

    sigma: float = 1e-2
    probes: int = 1
    memory: float = 0.9
    limit: float = 10.0

    def __post_init__(self) -> None:
        rules = {
            "sigma": (0 < self.sigma < math.inf, "positive"),
            "probes": (self.probes >= 1, "at least 1"),
            "memory": (0 <= self.memory < 1, "in [0, 1)"),
            "limit": (1 <= self.limit < math.inf, "at least 1"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise ValueError(f"HiZOO({name}=...) must be {rule}, got {getattr(self, name)!r}.")

    @property
    def traits(self) -> Traits:
        return Traits(LossOracle, "weights", "biased", 1, 1 + 2 * self.probes)

    def init(self, params: Mapping[str, Tensor]) -> Any:
        """Nothing is known of any tensor."""
        return {"curvature": {}, "looks": {}}

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        """See `Estimator.estimate`; the state has what is known of each tensor."""
        start = oracle.queries
        sizes = self._sizes(state["curvature"], params)
        directions = ShapedDirections(key, params, plan.directions, sizes=sizes)
        rows = torch.arange(plan.rows, device=plan.row.device)
        clean = oracle.losses(rows).double()
        asked = Differences("HiZOO", self.sigma, "clean", clean, plan)
        grad = asked.along(oracle, directions)
        curvature, looks = dict(state["curvature"]), dict(state["looks"])
        for probe in range(self.probes):
            # The tensor that has been looked at least; the first of those.
            name = min(params, key=lambda name: looks.get(name, 0))
            looks[name] = looks.get(name, 0) + 1
            own = key.fold("curvature").fold(probe)
            found, dropped = self._bend(oracle, {name: params[name]}, own, rows, clean)
            asked.nonfinite += dropped
            if found is not None:
                before = curvature.get(name, found)
                curvature[name] = self.memory * before + (1 - self.memory) * found
        made = Estimate(grad, asked.loss, oracle.queries - start, asked.info, asked.rows)
        return made, {"curvature": curvature, "looks": looks}

    def _bend(
        self, oracle: LossOracle, one: Mapping[str, Tensor], key: Key, rows: Tensor, clean: Tensor
    ) -> tuple[float | None, int]:
        """The curvature of a tensor, None where no row tells of it, and queries that were lost."""
        family = Directions(key, one, len(rows))
        up, down = (
            oracle.losses(rows, family, rows, side * self.sigma).double() for side in (1, -1)
        )
        valid = up.isfinite() & down.isfinite() & clean.isfinite()
        dropped = int((~up.isfinite()).sum() + (~down.isfinite()).sum())
        if not valid.any():
            return None, dropped
        bends = (up - 2 * clean + down)[valid] / self.sigma**2
        numbers = next(iter(one.values())).numel()
        return float(bends.mean()) / numbers, dropped

    def _sizes(self, curvature: Mapping[str, float], params: Mapping[str, Tensor]) -> Any:
        """Name -> s_t of the tensors of which something is known."""
        logs = {name: math.log(abs(h)) for name, h in curvature.items() if h and name in params}
        if not logs:
            return None
        middle, most = sum(logs.values()) / len(logs), math.log(self.limit)
        return {n: math.exp(max(-most, min(most, middle - log)) / 2) for n, log in logs.items()}

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(sigma=0.1, probes=2, memory=0.0, limit=100.0)]
