"""Node perturbation: noise in the activities of a network, and the loss that it makes.

Paper: S. Dalm, M. van Gerven and N. Ahmad, "Effective learning with node perturbation in deep
neural networks" (arXiv 2310.00965). For rows b with n_b noisy passes each (B rows), noise sigma z
in the outputs of layers, and x_l the clean input of layer l:

    NP   grad W_l = 1/B sum_b 1/n_b sum_k  (L_bk - L_b) / sigma^2  sigma z_bkl  x_bl^T
    INP  the same with noise in one layer at a time; the passes of a row are dealt to its layers
    ANP  grad W_l = 1/B sum_b 1/n_b sum_k  N (L_bk - L_b) / (sum_m |da_bkm|^2)  da_bkl  x_bl^T

ANP measures what has changed, `da_l = a_l(noisy) - a_l(clean)`: the layer's own noise and whatever
reached it from below; N is the number of outputs of all layers. To first order, in a chain of
layers, the mean of what stands before x_l is C_l g_l, with g_l the gradient by the layer's output
and C_l the covariance of da_l over the mean variance of an output: for a row it never points
uphill, and it is the gradient where nothing comes from below. It needs no knowledge of the noise,
which is its point: noise may come from a device and not from us. NP and INP know the noise and are
unbiased; INP has less variance where layers are few, since other layers do not disturb it.

Symbols: sigma `sigma`, z `noise`, (L_bk - L_b) / sigma / (B n_b) `coefficients`, da
`shift.outputs`, N `units`, N (L_bk - L_b) / sum |da|^2 `ratio`.

Differs from the paper in: several noisy passes of a row; Rademacher noise by default, of which
|z|^2 = N exactly, so that INP by its measured noise and by its known variance are one; any layer
with parameters, not only fully connected ones; clean inputs in the product. NP divides by sigma^2
and ANP multiplies by N, as E[v v^T / |v|^2] = 1 / N wants it; older code of the authors has sigma
and the root of N, which makes the learning rate depend on noise and width.

NP is `LikelihoodRatio` with Gaussian or Rademacher noise on all layers, of one absolute size, with
the clean loss as baseline and no exact head; both ask through `fwdlearn.differences`.

Cost a step, n directions a row: n + 1 queries a row. Memory: the inputs of layers in the clean pass
and a sum of the size of one output; ANP also keeps the outputs, the sums of all layers, and a block
of noisy passes.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.differences import Differences
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.laws import check_law
from fwdlearn.noise import GivenNoise, NoiseSum, SiteNoise
from fwdlearn.oracle import ActivationOracle, require_fed


@dataclass(frozen=True)
class NodePerturbation(Estimator):
    """Noise in all layers at once, as the likelihood ratio at its plainest (NP).

    Args:
        sigma: size of the noise, positive.
        law: "rademacher" or "gaussian".

    Raises:
        ValueError: a setting is out of range.
        UsageError: a parameter feeds no layer's output.

    Example:
        >>> NodePerturbation(sigma=0.1).traits.target
        'smoothed'
    """

    sigma: float = 1e-2
    law: str = "rademacher"

    traits = Traits(ActivationOracle, "activations", "smoothed", 1, 1)

    def __post_init__(self) -> None:
        _check(self)

    def estimate(
        self,
        oracle: ActivationOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        start = oracle.queries
        require_fed(oracle.left_out, type(self).__name__)
        clean = oracle.clean()
        differences = Differences(type(self).__name__, self.sigma, "clean", clean.losses, plan)
        noises, turn = self._noises(oracle, key, plan)

        def ask(row: Tensor, number: Tensor, scale: Tensor) -> Tensor:
            losses = torch.zeros_like(scale)
            for place, noise in enumerate(noises):
                mine = torch.nonzero(turn == place).flatten()
                if len(mine):
                    found = oracle.noisy_losses(row[mine], noise, number[mine], scale[mine])
                    losses[mine] = found.double()
            return losses

        # A layer that gets one pass in so many counts each of its own for so many.
        coefficients = differences.coefficients(ask) * len(noises)
        sums = []
        for place, noise in enumerate(noises):
            mine = torch.nonzero(turn == place).flatten()
            row, number = plan.row[mine], plan.direction[mine]
            sums.append(NoiseSum(noise, row, number, coefficients[mine], plan.rows))
        grad = clean.gather(ChainMap(*sums))  # type: ignore[arg-type]
        made = {name: grad[name].to(value.dtype) for name, value in params.items()}
        queries, rows = oracle.queries - start, differences.rows
        return Estimate(made, differences.loss, queries, differences.info, rows), state

    def _noises(
        self, oracle: ActivationOracle, key: Key, plan: Plan
    ) -> tuple[list[SiteNoise], Tensor]:
        """The noises, and which of them each pair of the plan gets, int64 [pairs]."""
        noise = SiteNoise(key, oracle.sites, plan.directions, self.law)
        return [noise], torch.zeros_like(plan.direction)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(sigma=0.3, law="gaussian")]


@dataclass(frozen=True)
class IterativeNodePerturbation(NodePerturbation):
    """Noise in one layer at a time (INP).

    The directions of a row go to the layers in turn, from a random layer on. Where a row has fewer
    of them than there are layers, some of its layers go without in each step; the mean is the same.

    Args:
        sigma: size of the noise, positive.
        law: "rademacher" or "gaussian".

    Raises:
        ValueError: a setting is out of range.
        UsageError: a parameter feeds no layer's output.

    Example:
        >>> IterativeNodePerturbation().traits.queries_per_direction
        1
    """

    def _noises(
        self, oracle: ActivationOracle, key: Key, plan: Plan
    ) -> tuple[list[SiteNoise], Tensor]:
        sites = oracle.sites
        noises = [SiteNoise(key, sites, plan.directions, self.law, only=(one,)) for one in sites]
        first = key.fold("first layer").low % len(noises)
        return noises, (plan.direction + first) % len(noises)


@dataclass(frozen=True)
class ActivityNodePerturbation(Estimator):
    """Noise at all layers at once, and the changes of activity that it causes (ANP).

    Args:
        sigma: size of the noise, positive; changes of single precision activities below 1e-3 of
            their size are rounded away.
        law: "rademacher" or "gaussian".

    Raises:
        ValueError: a setting is out of range.
        UsageError: a parameter feeds no layer's output.

    Example:
        >>> ActivityNodePerturbation(sigma=0.001).traits.target
        'biased'
    """

    sigma: float = 1e-2
    law: str = "rademacher"

    traits = Traits(ActivationOracle, "activations", "biased", 1, 1)

    def __post_init__(self) -> None:
        _check(self)

    def estimate(
        self,
        oracle: ActivationOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        start = oracle.queries
        require_fed(oracle.left_out, type(self).__name__)
        clean = oracle.clean(outputs=True)
        units = sum(math.prod(site.shape) for site in oracle.sites.values())
        noise = SiteNoise(key, oracle.sites, plan.directions, self.law)
        sums = {name: torch.zeros_like(value) for name, value in clean.outputs.items()}
        coefficients = plan.weight.new_zeros(len(plan))
        valid = torch.zeros(len(plan), dtype=torch.bool, device=plan.row.device)
        for shift in oracle.noisy_shifts(clean, plan.row, noise, plan.direction, self.sigma):
            row = plan.row[shift.queries]
            square = sum(
                value.reshape(len(value), -1).double().square().sum(1)
                for value in shift.outputs.values()
            )
            change = shift.losses.double() - clean.losses[row].double()
            ratio = units * change / square
            good = valid[shift.queries] = ratio.isfinite()
            coefficients[shift.queries] = torch.where(good, ratio, 0.0)
            _add(sums, GivenNoise(shift.outputs), row, torch.nonzero(good).flatten(), ratio)
        weight, nonfinite = plan.finite(valid)
        # The queries of a row that count have one weight.
        share = weight.new_zeros(plan.rows).scatter_reduce_(0, plan.row, weight, "amax")
        for value in sums.values():
            value.mul_(share.to(value.dtype).view(-1, *[1] * (value.dim() - 1)))
        grad = clean.gather(sums)
        made = {name: grad[name].to(value.dtype) for name, value in params.items()}
        losses = torch.where(weight > 0, clean.losses[plan.row], 0.0)
        info = {
            "coef_abs": coefficients.abs().mean() * self.sigma,
            "nonfinite": torch.tensor(nonfinite),
        }
        return Estimate(made, (weight * losses).sum(), oracle.queries - start, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(sigma=0.2, law="gaussian"), cls(sigma=1e-3)]


def _check(estimator: NodePerturbation | ActivityNodePerturbation) -> None:
    owner = type(estimator).__name__
    if not 0 < estimator.sigma < math.inf:
        raise ValueError(f"{owner}(sigma=...) must be positive, got {estimator.sigma!r}.")
    check_law(owner, estimator.law, None)


def _add(
    sums: dict[str, Tensor], shifts: GivenNoise, row: Tensor, index: Tensor, ratio: Tensor
) -> None:
    """Adds ratio times shift of some queries of a block to the sums of their rows."""
    if not len(index):
        return
    first, last = int(row.min()), int(row.max())
    terms = NoiseSum(shifts, row[index] - first, index, ratio[index], last + 1 - first)
    for name in terms:
        sums[name][first : last + 1].add_(terms[name])
