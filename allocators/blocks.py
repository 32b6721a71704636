"""Blocks: each step perturbs and updates one group of parameters, drawn by what it has to gain.

Papers: P. Zhao and T. Zhang, "Stochastic optimization with importance sampling" (ICML 2015),
optimal probabilities; F. Salehi, P. Thiran and L. E. Celis, "Coordinate descent with bandit
sampling" (NeurIPS 2018) and "Stochastic optimization with bandit sampling" (arXiv 1708.02544).

With directions in block s alone, d_s of its numbers and g_s its gradient, the squared error of n
directions is about d_s |g_s|^2 / n, and that of a step is a sum over blocks of a_s / p_s with a_s
the expected squared norm of the block's estimate and p_s its probability. A drawn block counts
1 / p_s, so the mean of the estimate stays the whole gradient.

    optimal     p_s proportional to sqrt(a_s), by running means of the a_s that were seen
    bandit      weights that grow by exp(rate * reward / p_s) for a reward of a_s / p_s^2, the
                derivative of the error by p_s, over the largest so far; p_s is a weight's share
    uniform     p_s = 1 / blocks

and every p_s is mixed with 1 / blocks by `explore`.

Symbols: a_s `sizes`, p_s `probability`.

With `rule: uniform`, `keep` and `always` it is the sampling of LISA (R. Pan et al., "LISA:
Layerwise importance sampling for memory-efficient large language model fine-tuning", NeurIPS 2024):
some layers, drawn anew every `keep` steps, and the first and the last ones in every step.

Differs from the papers in: blocks of a network's parameters in place of coordinates or examples;
the squared norm is that of an estimate, so its noise counts, as it should. The reported variance is
that of a block that was drawn.

Cost: no queries. A block's optimizer state is untouched while others are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Allocator, Block, Feedback, Plan
from fwdlearn.counts import check_counts, check_sharing, sharing_rows
from fwdlearn.keys import Key


@dataclass(frozen=True)
class Blocks(Allocator):
    """One block of parameters a step.

    Args:
        blocks: patterns of parameter names, at least two; a parameter belongs to the first one
            that its name matches, and must match one.
        directions: directions of every row, at least 1.
        rule: "optimal", "bandit" or "uniform".
        explore: the part of the probability that all blocks share, in (0, 1].
        memory: of the running means, in [0, 1).
        rate: of the bandit's weights, positive.
        keep: steps that a block stays once it is drawn, at least 1; momentum has that long to
            gather.
        always: patterns of parameters that every step is about beside its block.
        sharing: as for Uniform.

    Raises:
        UsageError: in training, where the patterns do not divide the model's parameters.

    Example:
        >>> allocator = Blocks(("layers.0.*", "*"))
        >>> plan, _ = allocator.allocate(3, {}, allocator.init(), key=Key.root(0))
        >>> plan.block.probability, plan.block.names(["layers.0.bias", "layers.1.bias"])
        (0.5, ('layers.1.bias',))
    """

    blocks: tuple[str, ...]
    directions: int = 4
    rule: Literal["optimal", "bandit", "uniform"] = "optimal"
    explore: float = 0.2
    memory: float = 0.9
    rate: float = 0.05
    sharing: str | int = "private"
    keep: int = 1
    always: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "always", tuple(self.always))
        check_counts("Blocks", self.directions)
        check_sharing("Blocks", self.sharing)
        rules = {
            "blocks": (len(self.blocks) >= 2, "two patterns or more"),
            "rule": (self.rule in ("optimal", "bandit", "uniform"), "optimal, bandit or uniform"),
            "explore": (0 < self.explore <= 1, "in (0, 1]"),
            "memory": (0 <= self.memory < 1, "in [0, 1)"),
            "rate": (0 < self.rate < math.inf, "positive"),
            "keep": (self.keep >= 1, "at least 1"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise ValueError(f"Blocks({name}=...) must be {rule}, got {getattr(self, name)!r}.")

    def init(self) -> Any:
        """Running means of the a_s, nan where nothing is known, the bandit's log-weights, and the
        block that is being kept."""
        count = len(self.blocks)
        nothing = torch.full((count,), math.nan, dtype=torch.float64)
        state = {"sizes": nothing, "weights": torch.zeros(count).double(), "largest": 0.0}
        return {**state, "number": 0, "probability": 1.0, "left": 0}

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        if not state["left"]:
            probability = self._probability(state)
            place = torch.searchsorted(probability.cumsum(0), key.uniform(1)[0]).item()
            number = min(int(place), len(self.blocks) - 1)
            drawn = {"number": number, "probability": float(probability[number])}
            state = {**state, **drawn, "left": self.keep}
        state = {**state, "left": state["left"] - 1}
        block = Block(self.blocks, state["number"], state["probability"], self.always)
        counts = torch.full((rows,), self.directions)
        return Plan(counts, sharing_rows(self.sharing, rows), block=block), state

    def observe(
        self, plan: Plan, signals: Mapping[str, Tensor], feedback: Feedback, state: Any
    ) -> Any:
        assert plan.block is not None
        number, p = plan.block.number, plan.block.probability
        squares = feedback.square_norms
        every = sum(value for name, value in squares.items() if plan.block.stays(name))
        # What was fed back counts the block 1 / p times.
        size = (feedback.square_norm - every) * p**2
        sizes, weights = state["sizes"].clone(), state["weights"].clone()
        known = not math.isnan(float(sizes[number]))
        sizes[number] = self.memory * sizes[number] + (1 - self.memory) * size if known else size
        reward = size / p**2
        largest = max(state["largest"], reward)
        if largest > 0:
            # At most `rate` a step, whatever the probability.
            weights[number] += self.rate * (self.explore / len(self.blocks)) * reward / largest / p
        known_now = {"sizes": sizes, "weights": weights - weights.max(), "largest": largest}
        return {**state, **known_now}

    def _probability(self, state: Any) -> Tensor:
        count = len(self.blocks)
        share = torch.full((count,), 1 / count, dtype=torch.float64)
        sizes = state["sizes"]
        known = ~sizes.isnan()
        if self.rule == "bandit":
            share = state["weights"].softmax(0)
        elif self.rule == "optimal" and bool(known.any()):
            root = torch.where(known, sizes, sizes[known].mean()).sqrt()
            share = root / root.sum() if root.sum() > 0 else share
        return (1 - self.explore) * share + self.explore / count

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(("w*", "*")),
            cls(("w*", "*"), 2, "bandit", sharing="shared"),
            cls(("w*", "*"), rule="uniform", keep=2),
        ]
