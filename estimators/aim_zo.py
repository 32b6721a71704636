"""Differences along directions that lie in the span of layers' inputs (AIM-ZO).

Paper: the idea of AIM-ZO (EkkoXy, 2026): probes of rank one inside a basis of activations that is
tracked by Oja's rule (E. Oja, "A simplified neuron model as a principal component analyzer", J.
Math. Biology 15, 1982).

The gradient of a layer's m x n matrix is a sum of products of output cotangents with inputs x, so
its rows lie in the span of the inputs. With Q [n, k] an orthonormal basis of where inputs have most
of their length, A [m, k] of rank one with signs,

    E = A Q^T
    grad = 1/B sum_b 1/n_b sum_j  (L_b(theta + sigma E_bj) - L_b(theta)) / sigma * E_bj

Symbols: k `width`, Q `bases`. The mean is the smoothed gradient times Q Q^T: its projection on the
tracked space. What inputs outside that space contribute is left out, nothing where the inputs lie
in it; the squared error falls with n / k. Parameters that are no layer's matrix, embeddings and
vectors among them, and matrices of less than 2 k rows, such as classifiers, get directions as in
RandomPerturbation, and their part is the smoothed gradient itself. |E|^2 is m k where it would be
m n, and the outputs move as much, since what a plain direction does outside the span of the inputs
moves nothing. So the same learning rate moves a model as far, by a shorter estimate: in the last
layer of MiniLM, 32 of 384 dimensions hold 0.72 of the squared gradient, and the estimate is 4.4
times shorter.

Tracking: every `refresh` steps, products of random signs at the layers' outputs with the inputs of
the clean pass that the step takes anyway give 2 k random sums of inputs; with the basis so far,
whose sizes are multiplied by `memory`, the leading k singular vectors of all are the new basis.
Directions use the basis of the steps before, so that they depend on no row of their own batch; the
first step has none and is RandomPerturbation's.

Differs from the paper in: one basis of width k a layer, all of which a direction mixes; a clean
loss as baseline, where the paper has the mean of the other probes; private directions.

Cost a step, n directions a row: n + 1 queries a row. A step that refreshes keeps the inputs of all
layers, and takes a product the size of the clean pass. State: n k numbers a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.differences import Differences
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.noise import NoiseSum, SiteNoise
from fwdlearn.oracle import ActivationOracle, CleanPass
from fwdlearn.shaped import ShapedDirections, matrices


@dataclass(frozen=True)
class AIMZO(Estimator):
    """Differences along directions that lie in the span of layers' inputs (AIM-ZO).

    Args:
        sigma: size of the perturbation, positive.
        width: of the basis of each layer, at least 1.
        refresh: steps between looks at the inputs, at least 1.
        memory: of the basis so far, in [0, 1).

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> AIMZO(width=8).traits.queries_per_row
        1
    """

    sigma: float = 1e-3
    width: int = 32
    refresh: int = 10
    memory: float = 0.9

    traits = Traits(ActivationOracle, "weights", "biased", 1, 1)

    def __post_init__(self) -> None:
        rules = {
            "sigma": (0 < self.sigma < float("inf"), "positive"),
            "width": (self.width >= 1, "at least 1"),
            "refresh": (self.refresh >= 1, "at least 1"),
            "memory": (0 <= self.memory < 1, "in [0, 1)"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise ValueError(f"AIMZO({name}=...) must be {rule}, got {getattr(self, name)!r}.")

    def estimate(
        self,
        oracle: ActivationOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        """See `Estimator.estimate`; the state has the basis of each matrix, columns of length
        singular value."""
        start = oracle.queries
        known = {} if state is None else state["inputs"]
        age = 0 if state is None else state["age"]
        bases = {name: value / value.norm(dim=0) for name, value in known.items() if name in params}
        rows = torch.arange(plan.rows, device=plan.row.device)
        if age % self.refresh:
            losses = oracle.losses(rows)
        else:
            clean = oracle.clean()
            losses = clean.losses
            known = {**known, **self._tracked(oracle, clean, params, known, key.fold("look"), rows)}
        directions = ShapedDirections(key, params, plan.directions, bases=bases)
        asked = Differences("AIMZO", self.sigma, "clean", losses, plan)
        grad = asked.along(oracle, directions)
        made = Estimate(grad, asked.loss, oracle.queries - start, asked.info, asked.rows)
        return made, {"inputs": known, "age": age + 1}

    def _tracked(
        self,
        oracle: ActivationOracle,
        clean: CleanPass,
        params: Mapping[str, Tensor],
        known: Mapping[str, Tensor],
        key: Key,
        rows: Tensor,
    ) -> dict[str, Tensor]:
        """Name of a matrix -> [n, k]: directions of its layer's inputs, as long as they are."""
        # Each row of a matrix gives one sum of inputs; few of them would be no basis.
        sides, layers = matrices(params), {}
        sides = {name: (m, n) for name, (m, n) in sides.items() if m >= 2 * self.width}
        for site, output in oracle.sites.items():
            ends = (output.shape[:1], output.shape[-1:])
            # An output of a layer for each row of its matrix; an embedding has one a column.
            own = [name for name in output.params if name in sides and sides[name][:1] in ends]
            if len(own) == 1 and params[own[0]].shape[0] == sides[own[0]][0]:
                layers[site] = own[0]
        if not layers:
            return {}
        signs = SiteNoise(key, oracle.sites, len(rows), only=tuple(layers))
        ones = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        sums = clean.gather(NoiseSum(signs, rows, rows, ones, len(rows)))
        found = {}
        for name in set(layers.values()) & sums.keys():
            m, n = sides[name]
            seen = sums[name].reshape(m, n)[: 2 * self.width].T
            if name in known:
                seen = torch.cat((seen, known[name].to(seen) * self.memory), 1)
            left, sizes, _ = torch.linalg.svd(seen, full_matrices=False)
            # Where inputs have no length, there is nothing to move along.
            kept = min(self.width, int((sizes > 1e-6 * sizes[0]).sum()))
            if kept:
                found[name] = left[:, :kept] * sizes[:kept]
        return found

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(sigma=0.05, width=2, refresh=1, memory=0.5)]
