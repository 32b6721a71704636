"""Node perturbation through time: noise at every step, and the losses that it can have changed.

Papers: Y. Fernandez, S. Keemink and M. van Gerven, "Gradient-free training of recurrent neural
networks using random perturbations" (Front. Neurosci. 18, 2024, https://arxiv.org/abs/2405.08967),
whose rule this one corrects; R. J. Williams, "Simple statistical gradient-following algorithms for
connectionist reinforcement learning" (1992), for credit by future rewards alone.

Update, for rows b with n_b noisy passes each (B rows), noise sigma z_t in the outputs of layers at
step t, x_t the clean input of the layer, l_t what step t adds to the loss:

    grad W = 1/B sum_b 1/n_b sum_k sum_t  c_bkt / sigma  z_bkt  x_bt^T
    c_t = sum_{t <= s <= t + H} gamma^(s - t) (l_s(noisy) - l_s(clean))

Noise cannot change what was before it, so only later losses count. With H and gamma as they are by
default the mean is the gradient of backpropagation through all of time. H = 0 is the rule as
published (the gradient of a net whose state comes from nowhere, truncated after one step), and
between the two lies a choice of bias against variance.

Symbols: H `horizon`, gamma `discount`, z `noise`, c / (sigma B n_b) `credit`.

All losses are known at the end only. With P_t = sum_{s < t} (l_s(noisy) - l_s(clean)) the sum is
c_t = P_T - P_t, so the pass itself adds up -P_t z_t x_t^T, and a second clean pass, with the same
noise drawn again, P_T z_t x_t^T: nothing grows with the length of a sequence. With a horizon there
is one pass, and the inputs of the last H steps are kept.

Differs from the paper in: the credit; a scalar for each row, not one for the batch; division by
sigma^2; many noisy passes a row; the layer that puts out what a step does gets the exact derivative
of that step's loss, where there is one, and no noise.

Cost a step, n directions a row: n + 2 queries a row, n + 1 with a horizon.

`PerturbationThroughTime` also has noise on the weights, z, which stands still for a sequence:

    grad = 1/B sum_b 1/n_b sum_k  (L_b(theta + sigma z_bk) - L_b) / sigma  z_bk

The squared error of either is the squared gradient times the numbers that a row's noise has: the
weights, or the outputs of layers at all steps. It takes what has fewer.
"""

from __future__ import annotations

import math
from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.laws import check_law
from fwdlearn.noise import NoiseSum, SiteNoise
from fwdlearn.oracle import Moment, TimeOracle, require_fed

# A discount that has come to less than this counts no more.
_LEAST = 1e-3


@dataclass(frozen=True)
class CausalNodePerturbation(Estimator):
    """Noise in all layers at every step; credit to it from the losses that come after.

    Args:
        sigma: size of the noise, positive.
        law: "rademacher" or "gaussian".
        horizon: how many steps later a loss still counts, at least 0; None for the whole rest of
            the sequence.
        discount: what a loss counts for each step that it comes later, above 0 and at most 1.
            Below 1 without a horizon, losses count until they count less than 0.001.
        exact_head: whether the layer that puts out what a step does gets its exact derivative.

    Raises:
        ValueError: a setting is out of range.
        UsageError: a parameter feeds no layer's output.

    Example:
        >>> CausalNodePerturbation(horizon=0).traits.target
        'biased'
    """

    sigma: float = 1e-2
    law: str = "rademacher"
    horizon: int | None = None
    discount: float = 1.0
    exact_head: bool = True

    def __post_init__(self) -> None:
        rules = {
            "sigma": (0 < self.sigma < math.inf, "positive"),
            "horizon": (self.horizon is None or self.horizon >= 0, "at least 0, or None"),
            "discount": (0 < self.discount <= 1, "above 0 and at most 1"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                got = getattr(self, name)
                raise ValueError(f"CausalNodePerturbation({name}=...) must be {rule}, got {got!r}.")
        check_law("CausalNodePerturbation", self.law, None)

    @property
    def traits(self) -> Traits:
        if self._window is None:
            return Traits(TimeOracle, "activations", "smoothed", 1, 2)
        return Traits(TimeOracle, "activations", "biased", 1, 1)

    @property
    def _window(self) -> int | None:
        """Steps for which a loss counts."""
        if self.horizon is None and self.discount < 1:
            return math.ceil(math.log(_LEAST) / math.log(self.discount))
        return self.horizon

    def estimate(
        self,
        oracle: TimeOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        require_fed(oracle.step_left_out, "CausalNodePerturbation")
        start = oracle.queries
        run, window = _Run(self, oracle, key, plan), self._window
        run.until_finite(run.all_later if window is None else partial(run.some_later, window))
        grad = {name: run.grad[name].to(value.dtype) for name, value in params.items()}
        return run.estimate(grad, oracle.queries - start), state

    def on_weights(
        self,
        oracle: TimeOracle,
        params: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        key: Key,
        plan: Plan,
    ) -> Estimate:
        """The estimate by noise on the parameters `own`, those beside the readout's."""
        start, run = oracle.queries, _Run(self, oracle, key, plan)
        family = Directions(key, own, plan.directions, self.law)
        run.until_finite(partial(run.still, family))
        slopes = plan.weight.new_zeros(plan.directions)
        slopes.index_add_(0, run.number, run.weight[run.kept] * run.change / self.sigma)
        moved = DirectionGradient(family, slopes)
        grad = {name: run.grad[name].to(v.dtype) for name, v in params.items() if name not in own}
        return run.estimate(ChainMap(grad, moved), oracle.queries - start)  # type: ignore[arg-type]

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(),
            cls(0.3, law="gaussian", exact_head=False),
            cls(0.1, horizon=3, discount=0.9),
            cls(discount=0.5),
        ]


@dataclass(frozen=True)
class PerturbationThroughTime(Estimator):
    """Noise in layers or on weights, whichever has fewer numbers; the exact readout in both cases.

    The log says which, `estimator.on_weights`, and why, `estimator.weight_numbers` and
    `estimator.layer_numbers`. Noise on weights that rows share counts once for each of them.

    Args:
        sigma: size of the noise, positive.
        law: "rademacher" or "gaussian".
        noise: in "layers", as `CausalNodePerturbation`; on "weights"; or "auto". What "auto" saves
            on weights in clean passes goes into a direction more for each row.

    Raises:
        ValueError: a setting is out of range.
        UsageError: a parameter feeds no layer's output.

    Example:
        >>> PerturbationThroughTime().traits.queries_per_row
        2
    """

    sigma: float = 1e-3
    law: str = "rademacher"
    noise: Literal["auto", "layers", "weights"] = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                f"PerturbationThroughTime(sigma=...) must be positive, got {self.sigma!r}."
            )
        if self.noise not in ("auto", "layers", "weights"):
            raise ValueError(
                "PerturbationThroughTime(noise=...) must be 'auto', 'layers' or 'weights', got "
                f"{self.noise!r}."
            )
        check_law("PerturbationThroughTime", self.law, None)

    @property
    def traits(self) -> Traits:
        own = 1 if self.noise == "weights" else 2
        return Traits(
            TimeOracle, "weights" if self.noise == "weights" else "activations", "smoothed", 1, own
        )

    def estimate(
        self,
        oracle: TimeOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        sites, head = oracle.step_sites, oracle.step_head()
        fed = {name for site in sites if site != head for name in sites[site].params}
        exact = set() if head is None else {*sites[head].params} - fed - {*oracle.step_left_out}
        own = {name: value for name, value in params.items() if name not in exact}
        weights = sum(value.numel() for value in own.values()) * min(plan.sharing, plan.rows)
        layers = oracle.length() * sum(
            math.prod(site.shape) for name, site in sites.items() if name != head
        )
        on_weights = self.noise == "weights" or (self.noise == "auto" and weights < layers)
        inner = CausalNodePerturbation(self.sigma, self.law)
        if on_weights:
            if self.noise == "auto":
                plan = Plan(plan.counts + (plan.counts > 0), plan.sharing, plan.row_weight)
            made = inner.on_weights(oracle, params, own, key, plan)
        else:
            made, _ = inner.estimate(oracle, params, None, key=key, plan=plan)
        told = {"on_weights": on_weights, "weight_numbers": weights, "layer_numbers": layers}
        info = {**made.info, **{name: torch.tensor(float(value)) for name, value in told.items()}}
        return replace(made, info=info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(0.3, noise="layers", law="gaussian"), cls(0.1, noise="weights")]


class _Run:
    """The passes of one estimate.

    Attributes:
        kept: int64 [n], those of the plan's pairs whose losses are finite.
        weight: float64 [pairs], 0 for the others.
        grad: name -> gradient so far.
        change: float64 [n], noisy loss less the clean one.
        clean: float64 [rows], clean losses.
    """

    def __init__(
        self, estimator: CausalNodePerturbation, oracle: TimeOracle, key: Key, plan: Plan
    ) -> None:
        self.estimator, self.oracle, self.key, self.plan = estimator, oracle, key, plan
        self.sites = dict(oracle.step_sites)
        self.head = oracle.step_head() if estimator.exact_head else None
        self.noisy = tuple(name for name in self.sites if name != self.head)
        self.weight, self.nonfinite = plan.weight, 0
        self.last: tuple[int, SiteNoise] | None = None

    def until_finite(self, passes: Callable[[], None]) -> None:
        """Runs them; and again without the queries whose losses came out infinite, if any."""
        while True:
            self.kept = torch.nonzero(self.weight > 0).flatten()
            self.row, self.number = self.plan.row[self.kept], self.plan.direction[self.kept]
            self.grad: dict[str, Tensor] = {}
            self.change = self.weight.new_zeros(len(self.kept))
            self.clean = self.weight.new_zeros(self.plan.rows)
            passes()
            if self.finite():
                return
            valid = torch.zeros_like(self.weight, dtype=torch.bool)
            valid[self.kept] = self.change.isfinite()
            self.weight, self.nonfinite = self.plan.finite(valid)

    def finite(self) -> bool:
        """Whether all losses so far are."""
        return bool(self.change.isfinite().all())

    def all_later(self) -> None:
        """Every later loss counts: the sum so far in one pass, the whole sum in another."""
        for moment in self.moments(self.row, self.number):
            self.add(moment, -self.change, self.exact(moment))
            self.observe(moment)
        if self.finite():
            for moment in self.moments(self.row[:0], self.number[:0]):
                self.add(moment, self.change, {})

    def some_later(self, window: int) -> None:
        """Losses up to `window` steps later count, each less by the discount than the last."""
        waiting: deque[Moment] = deque()
        credit = self.change.new_zeros(window + 1, len(self.kept))
        share = self.change.new_zeros(window + 1, 1)
        for moment in self.moments(self.row, self.number):
            place = moment.step % (window + 1)
            share *= self.estimator.discount
            credit[place], share[place] = 0.0, 1.0
            credit += share * self.observe(moment)
            waiting.append(moment)
            if len(waiting) > window:
                self.settle(waiting.popleft(), credit)
        for moment in waiting:
            self.settle(moment, credit)

    def still(self, family: Directions) -> None:
        """Noise on weights that stands still for a sequence: its whole loss counts."""
        sigma = self.estimator.sigma
        losses = self.oracle.losses(self.row, family, self.number, sigma).double()
        for moment in self.moments(self.row[:0], self.number[:0]):
            self.gather(moment, self.exact(moment))
            self.clean += moment.clean.double()
        self.change = losses - self.clean[self.row]

    def estimate(self, grad: Mapping[str, Tensor], queries: int) -> Estimate:
        """What has been found, around a gradient."""
        plan, change = self.plan, torch.zeros_like(self.plan.weight)
        change[self.kept] = self.change / self.estimator.sigma
        clean = self.clean[plan.row].where(self.weight > 0, 0.0)
        info = {"coef_abs": change.abs().mean(), "nonfinite": torch.tensor(self.nonfinite)}
        rows = {"square_slope": plan.square_slopes(change, self.weight)}
        return Estimate(grad, (self.weight * clean).sum(), queries, info, rows)

    def moments(self, row: Tensor, number: Tensor) -> Iterator[Moment]:
        return self.oracle.moments(row, self.noise, number, self.estimator.sigma)

    def settle(self, moment: Moment, credit: Tensor) -> None:
        """Adds what a step contributes, now that the losses that count for it are known."""
        own = credit[moment.step % len(credit)]
        self.add(moment, own, self.exact(moment))

    def observe(self, moment: Moment) -> Tensor:
        """float64 [queries]: what noise has changed in the loss of a step."""
        clean = moment.clean.double()
        change = moment.losses.double() - clean[self.row]
        self.change += change
        self.clean += clean
        return change

    def noise(self, step: int) -> SiteNoise:
        """The noise of a step; that of the last one asked for is kept, with its numbers."""
        if self.last is None or self.last[0] != step:
            law, count = self.estimator.law, self.plan.directions
            made = SiteNoise(self.key.fold(step), self.sites, count, law, only=self.noisy)
            self.last = step, made
        return self.last[1]

    def exact(self, moment: Moment) -> Mapping[str, Tensor]:
        """What the layer that puts out gets in the place of noise."""
        if self.head is None:
            return {}
        row = self.weight.new_zeros(self.plan.rows).index_add_(0, self.plan.row, self.weight)
        value = moment.exact[self.head]
        row = row.view(-1, *[1] * (value.dim() - 1))
        return {self.head: torch.where(row > 0, value, 0.0) * row.to(value.dtype)}

    def add(self, moment: Moment, change: Tensor, exact: Mapping[str, Tensor]) -> None:
        """Adds the products of a step."""
        credit = self.weight[self.kept] * change / self.estimator.sigma
        noise = self.noise(moment.step)
        sums = NoiseSum(noise, self.row, self.number, credit, self.plan.rows)
        self.gather(moment, ChainMap(exact, sums))  # type: ignore[arg-type]

    def gather(self, moment: Moment, cotangents: Mapping[str, Tensor]) -> None:
        """Adds the products of a step's layers."""
        for name, value in moment.gather(cotangents).items():
            if name in self.grad:
                self.grad[name] += value
            else:
                self.grad[name] = value.clone()
