"""Likelihood ratio: noise at the outputs of layers, and the score of the noise as its gradient.

Papers: J. Jiang, Z. Zhang et al., "One forward is enough for neural network training via likelihood
ratio method" (ICLR 2024, https://arxiv.org/abs/2305.08960), noise on outputs or weights, layer by
layer, antithetic pairs, quasi-Monte-Carlo, the hybrid; W. Kool, H. van Hoof and M. Welling, "Buy 4
REINFORCE samples, get a baseline for free" (2019), leave-one-out.

Update, for the layer with output a of row b and noise sigma s z in it:

    cotangent_b = 1/n_b sum_k (L_b(a + sigma s z_bk) - baseline_bk) / (sigma s) * score(z_bk)
    grad = 1/B sum_b (d a_b / d theta)^T cotangent_b

Symbols: s `sizes`, z `noise`, 1 / (B n_b) `plan.weight`, the differences over sigma `slopes`, the
second line `clean.gather`.

Differs from the paper in: all layers are perturbed at once unless `blocks` says otherwise; a
baseline is always subtracted; the product takes the clean input, so that noise in one layer does
not disturb the next and memory does not grow with the queries; what the last layer puts out has an
exact derivative (softmax minus target), where there is one, and no noise; noise is relative to the
output of its layer and balanced between layers (`fwdlearn.balance`).

Cost a step, n directions a row: n queries a row for each block, twice as many for pairs, and a
clean pass. Memory: the inputs of layers in the clean pass and one sum of the size of an output.
"""

from __future__ import annotations

import fnmatch
import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.balance import Balance, MeasuredSum
from fwdlearn.differences import BASELINES, Differences
from fwdlearn.directions import Directions
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.noise import LAWS, Noise, NoiseSum, Output, SiteNoise
from fwdlearn.oracle import ActivationOracle
from fwdlearn.orthogonal import orthogonal_noise
from fwdlearn.quasi import sobol_noise


@dataclass(frozen=True)
class LikelihoodRatio(Estimator):
    """Noise at the outputs of layers, gradients by products with their clean inputs.

    Args:
        sigma: size of the noise relative to the output of a layer (root of its mean square), or
            absolute where it is on weights; positive.
        noise: on the "outputs" of layers; on the "weights"; or "hybrid": on weights where a layer
            has fewer of them than outputs and where no layer's output feeds them, else on outputs.
        law: "rademacher", "gaussian", "laplace"; "orthogonal": Rademacher numbers, and the
            directions of a row orthogonal, better where there are nearly as many of them as noisy
            numbers in a row; or "sobol": scrambled Sobol points as normal numbers, for 21201 noisy
            numbers a row at most. The last two are kept in memory. On weights "rademacher"
            (rank-one directions) or "gaussian" (independent entries).
        baseline: what a noisy loss is compared with. "clean": the row's clean loss;
            "leave-one-out": the mean of the same row's others, better where noise is large;
            "antithetic": the loss under the opposite noise, at twice the queries.
        blocks: how many groups of consecutive layers get noise one after the other; each costs n
            queries a row. As many as layers with noise is layer by layer.
        exact_head: whether the layer that puts out what the model does gets its exact derivative
            by the objective. Where there is none (0-1 loss) it gets noise all the same.
        balance: whether sizes follow running estimates of what each layer needs, or the outputs
            alone.
        weights: for "hybrid", patterns of the parameters that get noise themselves.

    Raises:
        ValueError: a setting is out of range.
        UsageError: the model has parameters that no layer's output feeds, and noise is on outputs;
            or `blocks` or `weights` do not fit the model, or "leave-one-out" the plan.

    Example:
        >>> LikelihoodRatio(baseline="antithetic", blocks=3).traits.queries_per_direction
        6
    """

    sigma: float = 1e-2
    noise: Literal["outputs", "weights", "hybrid"] = "outputs"
    law: str = "rademacher"
    baseline: Literal["clean", "leave-one-out", "antithetic"] = "clean"
    blocks: int = 1
    exact_head: bool = True
    balance: bool = True
    weights: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
        where, laws = ("outputs", "weights", "hybrid"), (*LAWS, "orthogonal", "sobol")
        if self.noise != "outputs":
            laws = ("rademacher", "gaussian")
        rules = {
            "sigma": (0 < self.sigma < math.inf, "positive"),
            "noise": (self.noise in where, f"one of {', '.join(where)}"),
            "law": (self.law in laws, f"one of {', '.join(laws)} for noise={self.noise!r}"),
            "baseline": (self.baseline in BASELINES, f"one of {', '.join(BASELINES)}"),
            "blocks": (self.blocks >= 1, "at least 1"),
            "weights": (self.weights is None or self.noise == "hybrid", "left to noise='hybrid'"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                got = getattr(self, name)
                raise ValueError(f"LikelihoodRatio({name}=...) must be {rule}, got {got!r}.")
        if self.noise == "weights" and self.blocks > 1:
            raise ValueError(
                "LikelihoodRatio(blocks=...) divides layers with noise at their outputs, of which "
                "noise='weights' leaves none."
            )

    @property
    def traits(self) -> Traits:
        groups = {"outputs": self.blocks, "weights": 1, "hybrid": self.blocks + 1}[self.noise]
        queries = groups * (2 if self.baseline == "antithetic" else 1)
        on_weights = self.noise == "weights"
        perturbs: Literal["weights", "activations"] = "weights" if on_weights else "activations"
        return Traits(ActivationOracle, perturbs, "smoothed", queries, 1)

    def init(self, params: Mapping[str, Tensor]) -> Balance:
        return Balance()

    def estimate(
        self,
        oracle: ActivationOracle,
        params: Mapping[str, Tensor],
        state: Balance,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Balance]:
        start, sites, clean = oracle.queries, oracle.sites, oracle.clean()
        head = clean.exact if self.exact_head else {}
        layers, own = self._divided(sites, oracle.left_out, params, head)
        differences = Differences("LikelihoodRatio", self.sigma, self.baseline, clean.losses, plan)
        sizes = (state if self.balance else Balance()).sizes(
            {name: float(clean.rms[name]) for name in layers}
        )
        state = state.probed(clean, sites, layers, key)
        grads: list[Mapping[str, Tensor]] = []
        variance = torch.zeros((), dtype=torch.float64, device=plan.row.device)
        if own:
            perturbed = {name: params[name] for name in own}
            rank = 1 if self.law == "rademacher" else None
            family = Directions(key, perturbed, plan.directions, self.law, rank)
            grads.append(moved := differences.along(oracle, family))
            variance += (moved.coefficients.square() * (moved.square_norms() - 1)).sum()
        sums = []
        for names in _parted(layers, self.blocks):
            noise = self._noise(key, sites, plan, sizes, names)
            coefficients = differences.coefficients(partial(_on_outputs, oracle, noise))
            total = NoiseSum(noise, plan.row, plan.direction, coefficients, plan.rows)
            sums.append(MeasuredSum(total, plan))
            variance += sums[-1].variance(state.gains)
        exact = {name: differences.weighted(value) for name, value in head.items()}
        grads.append(clean.gather(ChainMap(exact, *sums)))  # type: ignore[arg-type]
        grads.append({name: torch.zeros_like(value) for name, value in params.items()})
        info = differences.info
        if plan.sharing == 1 and self.law != "sobol":
            info["variance"] = variance
        grad: Mapping[str, Tensor] = ChainMap(*grads)  # type: ignore[arg-type]
        queries, rows = oracle.queries - start, differences.rows
        estimate = Estimate(grad, differences.loss, queries, info, rows)
        return estimate, state.measured(sums)

    def _divided(
        self,
        sites: Mapping[str, Output],
        left_out: Mapping[str, str],
        params: Mapping[str, Tensor],
        head: Mapping[str, Tensor],
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The layers that get noise at their outputs, and the parameters that get it themselves."""
        inner = {name: output for name, output in sites.items() if name not in head}
        fed = {*left_out, *(name for output in inner.values() for name in output.params)}
        own = {name for name in fed if self._itself(name, left_out, params, inner)}
        lost = next((name for name in left_out if name not in own), None)
        if lost is not None:
            raise UsageError(
                f"LikelihoodRatio cannot learn {lost} from noise at outputs: {left_out[lost]}. "
                "Give it noise itself with noise='hybrid', or set requires_grad to False."
            )
        layers = tuple(name for name, output in inner.items() if not own.issuperset(output.params))
        if self.noise == "hybrid" and not (own and layers):
            where = "outputs" if layers else "weights"
            raise UsageError(
                f"LikelihoodRatio(noise='hybrid') finds noise on {where} alone to be in place "
                f"here; noise={where!r} does that with fewer queries."
            )
        if self.blocks > max(1, len(layers)):
            raise UsageError(
                f"LikelihoodRatio(blocks={self.blocks}) divides {len(layers)} layers with noise "
                f"into more blocks than there are; blocks={max(1, len(layers))} is layer by layer."
            )
        return layers, tuple(name for name in params if name in own)

    def _itself(
        self,
        name: str,
        left_out: Mapping[str, str],
        params: Mapping[str, Tensor],
        layers: Mapping[str, Output],
    ) -> bool:
        """Whether a parameter gets noise itself."""
        if self.noise != "hybrid":
            return self.noise == "weights"
        if self.weights is not None:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.weights)
        used = [output for output in layers.values() if name in output.params]
        return name in left_out or any(
            sum(params[one].numel() for one in output.params) < math.prod(output.shape)
            for output in used
        )

    def _noise(
        self,
        key: Key,
        sites: Mapping[str, Output],
        plan: Plan,
        sizes: Mapping[str, float],
        names: tuple[str, ...],
    ) -> Noise:
        scales = {name: sizes[name] for name in names}
        if self.law == "orthogonal":
            return orthogonal_noise(key, sites, plan, scales, names, plan.row.device)
        if self.law == "sobol":
            return sobol_noise(key, sites, plan.directions, scales, names, plan.row.device)
        return SiteNoise(key, sites, plan.directions, self.law, scales, names)

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(),
            cls(0.3, law="gaussian", baseline="leave-one-out", balance=False),
            cls(0.1, law="laplace", baseline="antithetic", blocks=2),
            cls(0.05, law="sobol"),
            cls(0.1, noise="weights", law="gaussian"),
            cls(0.02, noise="hybrid", weights=("*bias",)),
            cls(0.05, law="orthogonal"),
        ]


def _parted(layers: tuple[str, ...], blocks: int) -> list[tuple[str, ...]]:
    """Groups of consecutive layers, none of them empty."""
    edges = [len(layers) * number // blocks for number in range(blocks + 1)]
    return [layers[a:b] for a, b in zip(edges, edges[1:], strict=False) if a < b]


def _on_outputs(
    oracle: ActivationOracle, noise: Noise, row: Tensor, number: Tensor, scale: Tensor
) -> Tensor:
    return oracle.noisy_losses(row, noise, number, scale)
