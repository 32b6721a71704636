"""Approximated likelihood ratio: of the score of the noise, only the sign is kept.

Paper: Z. Zhang et al., "Approximated likelihood ratio: a forward-only and parallel framework for
boosting neural network training" (arXiv 2403.12320). What it says of the code leaves two readings,
and both are here. With dL_bk the difference of losses of row b under its k-th noise z:

    "noise"     cotangent_b = sqrt(pi / 2) / (sigma s)  mean_k  dL_bk sign(z_bk)
    "product"   cotangent_b = (pi / 2)^(3/2) / (sigma s)  mean_k |dL_bk|  mean_k sign(dL_bk z_bk)

Symbols: s `sizes`, dL / sigma with the weight of the plan `coefficients`, sign(z) `SignedNoise`.
The factors make up for what signs lose where dL and z are jointly normal, as many small terms are.

Differs from the paper in: the row's clean loss is subtracted, since the sign of a positive loss
times noise says nothing; in the reading "product" a row's mean |dL| is kept beside its signs, one
number, without which rows of small differences would count as much as others; clean inputs in the
outer product.

Cost a step, n directions a row: n + 1 queries a row. Memory between the passes and the sum: one
bit for every noisy number, where normal noise that is kept takes 32. The first reading needs pi / 2
times the queries of the exact score for the same error. `LikelihoodRatio(law="rademacher")` needs
one bit too, is exact and no dearer: it is the better choice wherever the law of the noise is ours.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.balance import Balance
from fwdlearn.coded import FACTOR, SignedNoise
from fwdlearn.differences import Differences
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.noise import NoiseSum
from fwdlearn.oracle import ActivationOracle


@dataclass(frozen=True)
class ApproximateLikelihoodRatio(Estimator):
    """Noise at the outputs of layers of which one bit an entry is kept: its sign.

    Args:
        sigma: size of the noise relative to the output of a layer, positive.
        code: "noise" keeps the differences of losses and the signs of the noise; "product" keeps
            the signs of their products, and a row's mean difference.
        exact_head: whether the layer that puts out what the model does gets its exact derivative
            by the objective. Where there is none (0-1 loss) it gets noise all the same.

    Raises:
        ValueError: a setting is out of range.
        UsageError: the model has parameters that no layer's output feeds.

    Example:
        >>> ApproximateLikelihoodRatio(code="product").traits.target
        'biased'
    """

    sigma: float = 1e-2
    code: Literal["noise", "product"] = "noise"
    exact_head: bool = True

    traits = Traits(ActivationOracle, "activations", "biased", 1, 1)

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                f"ApproximateLikelihoodRatio(sigma=...) must be positive, got {self.sigma!r}."
            )
        if self.code not in ("noise", "product"):
            raise ValueError(
                "ApproximateLikelihoodRatio(code=...) must be 'noise' or 'product', got "
                f"{self.code!r}."
            )

    def estimate(
        self,
        oracle: ActivationOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        owner, start = type(self).__name__, oracle.queries
        for name, why in oracle.left_out.items():
            raise UsageError(
                f"{owner} cannot learn {name} from noise at outputs: {why}. Set its requires_grad "
                "to False, or choose an estimator that perturbs weights."
            )
        clean = oracle.clean()
        head = clean.exact if self.exact_head else {}
        layers = tuple(name for name in oracle.sites if name not in head)
        sizes = Balance().sizes({name: float(clean.rms[name]) for name in layers})
        noise = SignedNoise(key, oracle.sites, plan.directions, scales=sizes, only=layers)
        differences = Differences(owner, self.sigma, "clean", clean.losses, plan)
        sums: list[Mapping[str, Tensor]] = []
        if layers:
            coefficients = differences.coefficients(partial(_on_outputs, oracle, noise))
            if self.code == "product":
                coefficients = FACTOR**2 * _signed(coefficients, differences.weight, plan)
            sums = [NoiseSum(noise, plan.row, plan.direction, coefficients, plan.rows)]
        exact = {name: differences.weighted(value) for name, value in head.items()}
        gathered = clean.gather(ChainMap(exact, *sums))  # type: ignore[arg-type]
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        info = differences.info
        queries, rows = oracle.queries - start, differences.rows
        return Estimate({**zeros, **gathered}, differences.loss, queries, info, rows), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(0.1, code="product"), cls(0.5, exact_head=False)]


def _signed(coefficients: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Each coefficient's sign times the mean size of those of its row that count."""
    size, count = coefficients.new_zeros(2, plan.rows).unbind()
    size = size.index_add(0, plan.row, coefficients.abs())
    count = count.index_add(0, plan.row, (weight > 0).to(coefficients.dtype))
    return coefficients.sign() * (size / count.clamp(min=1))[plan.row]


def _on_outputs(
    oracle: ActivationOracle, noise: SignedNoise, row: Tensor, number: Tensor, scale: Tensor
) -> Tensor:
    return oracle.noisy_losses(row, noise, number, scale)
