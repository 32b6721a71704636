"""How much noise each layer should get when all of them get noise at once.

To first order an estimate of the gradient of layer l, from noise of size s_k in every layer k, has
the variance w_l / s_l^2 * sum_k s_k^2 G_k: w_l is what a unit cotangent of the layer's output makes
of its parameters, E |J^T z|^2, and G_l = E |g_l|^2 the size of the true cotangent. The sum of the
variances over layers is least at s_l ~ (w_l / G_l)^(1/4), where it equals that of the best division
of the queries among layers perturbed one at a time.

Neither number is known, both are estimated as training goes on: w from one product with random
numbers now and then, G without bias from the products of different queries of a row. What cannot be
told from zero counts as its standard error, so that nothing is perturbed wildly for want of data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.keys import Key
from fwdlearn.noise import NoiseSum, Output, SiteNoise
from fwdlearn.oracle import CleanPass

# Steps that a running mean looks back on.
_WINDOW = 100
# Steps before estimates are used, and between two products with random numbers.
_WARM_UP, _PROBE = 10, 20
# How far a size may lie from the scale of the layer's output.
_FARTHEST = 8.0


@dataclass(frozen=True)
class Balance:
    """Running estimates: the state of an estimator that balances its noise.

    Args:
        probes: how often `probed` was called.
        steps: how many estimates of the powers there were.
        gains: name of a layer -> w of one row.
        powers: name -> running mean of the estimates of G.
        squares: name -> running mean of their squares.
    """

    probes: int = 0
    steps: int = 0
    gains: Mapping[str, float] = field(default_factory=dict)
    powers: Mapping[str, float] = field(default_factory=dict)
    squares: Mapping[str, float] = field(default_factory=dict)

    def sizes(self, rms: Mapping[str, float]) -> dict[str, float]:
        """Size of the noise in each layer of `rms`; their geometric mean is that of the values."""
        largest = max(rms.values(), default=0.0) or 1.0
        # A layer that puts out zeros may have something to learn yet.
        scale = {name: max(value, 0.01 * largest) for name, value in rms.items()}
        known = self.powers.keys() & self.gains.keys()
        if not rms or self.steps < _WARM_UP or not rms.keys() <= known:
            return scale
        wanted = {
            name: math.log(max(self.gains[name], 1e-30) / self._power(name)) / 4 for name in rms
        }
        logs = {name: math.log(value) for name, value in scale.items()}
        shift = (sum(logs.values()) - sum(wanted.values())) / len(rms)
        most = math.log(_FARTHEST)
        return {
            name: scale[name] * math.exp(min(max(wanted[name] + shift - logs[name], -most), most))
            for name in rms
        }

    def probed(
        self, clean: CleanPass, sites: Mapping[str, Output], layers: Sequence[str], key: Key
    ) -> Balance:
        """The state with gains from a product of the clean pass, measured anew now and then."""
        known = all(name in self.gains for name in layers)
        after = replace(self, probes=self.probes + 1)
        if not layers or (known and self.probes % _PROBE):
            return after
        row = torch.arange(len(clean.losses), device=clean.losses.device)
        # Signs of few rows may cancel each other altogether.
        noise = SiteNoise(key.fold("probe"), sites, len(row), "gaussian", only=layers)
        products = clean.gather(NoiseSum(noise, row, row, torch.ones_like(row).double(), len(row)))
        squares = {name: value.double().square().sum() for name, value in products.items()}
        gains = [sum(squares[name] for name in sites[layer].params) for layer in layers]
        found = (torch.stack(gains) / len(row)).tolist()  # type: ignore[arg-type]
        measured = dict(zip(layers, found, strict=True))
        return replace(
            after, gains=_mean(self.gains, measured, 1 / min(self.probes // _PROBE + 1, 5))
        )

    def measured(self, sums: Sequence[MeasuredSum]) -> Balance:
        """The state after sums over queries that have been formed."""
        layers = [name for total in sums for name in total]
        found = torch.cat([total.powers() for total in sums]).tolist() if sums else []
        if not all(map(math.isfinite, found)):
            return self
        new = dict(zip(layers, found, strict=True))
        part = 1 / min(self.steps + 1, _WINDOW)
        powers = _mean(self.powers, new, part)
        squares = _mean(self.squares, {name: value**2 for name, value in new.items()}, part)
        return replace(self, steps=self.steps + 1, powers=powers, squares=squares)

    def _power(self, name: str) -> float:
        mean = self.powers[name]
        error = math.sqrt(max(self.squares[name] - mean**2, 0.0) / min(self.steps, _WINDOW))
        return max(mean, error, 1e-30)


def _mean(old: Mapping[str, float], new: Mapping[str, float], part: float) -> dict[str, float]:
    """Old values moved towards new ones; those without an old value start there."""
    moved = {name: old.get(name, value) * (1 - part) + value * part for name, value in new.items()}
    return {**old, **moved}


class MeasuredSum(Mapping[str, Tensor]):
    """A sum over queries that remembers the squared norm of each row's part as it is formed.

    Args:
        total: the sum; its coefficients are weights of the plan times slopes.
        plan: of the queries.
    """

    def __init__(self, total: NoiseSum, plan: Plan) -> None:
        self.total, self.plan = total, plan
        self._squares: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, 0, self.total.rows)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """See `NoiseSum.part`."""
        found = self.total.part(name, start, stop)
        squares = found.reshape(len(found), -1).square().sum(1).double()
        kept = self._squares.setdefault(name, squares.new_zeros(self.total.rows))
        kept[start:stop] = squares
        return found

    def powers(self) -> Tensor:
        """float64 [layers]: unbiased estimates of the mean over rows of |cotangent|^2.

        Products of different queries have the right mean: the square of the sum less the sum of
        the squares. Not a number where no row has two queries.
        """
        plan, total = self.plan, self.total
        square, weight, count = torch.zeros(
            3, plan.rows, dtype=torch.float64, device=total.row.device
        )
        square.index_add_(0, total.row, total.coefficients.double().square())
        weight.index_add_(0, total.row, plan.weight)
        count.index_add_(0, total.row, torch.ones_like(plan.weight))
        overlap = total.noise.overlap(count)
        own = square * overlap
        pairs = count / (count - overlap).clamp(min=1) / weight.square().clamp(min=1e-300)
        found = []
        for name in total:
            products = pairs * (self._squares[name] - own * self._energy(name))
            found.append(products[count > 1].mean())
        return torch.stack(found)

    def variance(self, gains: Mapping[str, float]) -> Tensor:
        """Of the gradients, summed: the trace of a covariance, to first order.

        It holds where no two rows share a number of the noise.
        """
        noise, row = self.total.noise, self.total.row
        each = sum(gains[name] / noise.size(name) ** 2 for name in self.total)
        count = torch.bincount(row, minlength=self.plan.rows).double()
        squares = self.total.coefficients.double().square() * noise.overlap(count)[row]
        return squares.sum() * noise.energy * each

    def _energy(self, name: str) -> float:
        """Squared norm of the score of one query, over the squared size of the noise."""
        noise = self.total.noise
        return noise.energy * math.prod(noise.shape(name)) / noise.size(name) ** 2

    def __contains__(self, name: object) -> bool:
        return name in self.total

    def __iter__(self) -> Iterator[str]:
        return iter(self.total)

    def __len__(self) -> int:
        return len(self.total)
