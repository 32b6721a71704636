"""A readout that is solved for: ridge regression of targets on what comes into the last layer.

Everything before the last layer stays as it was drawn. Of a recurrent network that is the readout
of a reservoir (H. Jaeger, "The echo state approach to analysing and training recurrent neural
networks", 2001), of any other network one of random features. What it reaches says nothing of how
the other weights of other methods were trained.

    W = argmin sum |W h - y|^2 + r m |W|^2,   h = (what comes in, 1),  m = mean square of h

y are numbers as they are, or classes as one-hot vectors; sums run over all batches so far, float64.
Every fourth batch is kept aside to choose among the ridges r, then all are fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.baselines.baseline import Baseline
from fwdlearn.estimator import Estimate, Traits
from fwdlearn.keys import Key
from fwdlearn.objectives import per_step, step_weights
from fwdlearn.oracle import LossOracle

RIDGES = (1e-8, 1e-6, 1e-4, 1e-2)
# One batch of so many is kept aside.
_EVERY = 4


@dataclass
class RidgeSums:
    """Sums over batches: of those that are fitted, and of those that choose the ridge.

    Attributes:
        batches: added so far.
        fitted, held: h h^T, h y^T and |y|^2, once there is a batch of the kind.
    """

    batches: int = 0
    fitted: list[Tensor] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)

    def add(self, inputs: Tensor, targets: Tensor, outputs: int) -> None:
        """Adds a batch.

        Args:
            inputs: of the last layer, [rows, ..., features].
            targets: of the batch; steps that do not count are left out.
            outputs: of the last layer.
        """
        if per_step(targets):
            mask = step_weights(targets) > 0
            inputs, targets = inputs[mask], targets[mask]
        wanted = targets if targets.is_floating_point() else F.one_hot(targets, outputs)
        made_of = torch.cat((inputs, torch.ones_like(inputs[:, :1])), 1).double()
        wanted = wanted.double().flatten(1)
        products = [made_of.T @ made_of, made_of.T @ wanted, wanted.square().sum()]
        self.batches += 1
        part = self.fitted if self.batches % _EVERY else self.held
        part[:] = [a + b for a, b in zip(part, products, strict=True)] if part else products

    def solved(self, ridges: Sequence[float] = RIDGES) -> tuple[Tensor, Tensor, float]:
        """Weight, bias and the ridge that did best on what was kept aside, the largest if nothing.

        Args:
            ridges: multiples of the mean square of what comes in, each positive.
        """
        if not self.held:
            best, sums = max(ridges), self.fitted
        else:
            best = min(ridges, key=self._error)
            sums = [a + b for a, b in zip(self.fitted, self.held, strict=True)]
        made = _solution(sums, best)
        return made[:-1].T, made[-1], best

    def _error(self, ridge: float) -> float:
        """The squared error of what was kept aside, when the rest is fitted."""
        made, (square, product, size) = _solution(self.fitted, ridge), self.held
        return float((made * (square @ made)).sum() - 2 * (made * product).sum() + size)


def _solution(sums: Sequence[Tensor], ridge: float) -> Tensor:
    """[features + 1, outputs]; the last row is the bias."""
    square, product, _ = sums
    size = ridge * square.diagonal().mean()
    return torch.linalg.solve(square + size * torch.eye(len(square)).to(square), product)


@dataclass(frozen=True)
class Last:
    """The linear layer whose output is the model's.

    Args:
        weight, bias: names of its parameters; a bias of None is not there.
        inputs: what came in, [rows, ..., features].
        loss: scalar, of the batch.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    loss: Tensor


@runtime_checkable
class ReadoutOracle(LossOracle, Protocol):
    """Shows what comes into the last layer."""

    def last(self) -> tuple[Last, Tensor]:
        """The last layer, and the targets of the batch. Counts a query a row."""


class Solved(dict[str, Tensor]):
    """Name -> the values that parameters take, whatever the optimizer; others stay."""


@dataclass(frozen=True)
class RidgeReadout(Baseline):
    """The readout is solved for after every batch, from all batches so far; the rest stays.

    Raises:
        UsageError: what the model puts out comes from no nn.Linear.

    Example:
        >>> RidgeReadout().traits.queries_per_row
        1
    """

    traits = Traits(ReadoutOracle, "weights", "biased", 0, queries_per_row=1)
    remark = (
        "solves for the last layer, by ridge regression on all rows so far, and leaves everything "
        "before it as it was drawn: where it does as well, the task says nothing of how that was "
        "trained. A row counts one query."
    )

    def init(self, params: Mapping[str, Tensor]) -> RidgeSums:
        return RidgeSums()

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        assert isinstance(oracle, ReadoutOracle)
        start = oracle.queries
        last, targets = oracle.last()
        sums = RidgeSums(state.batches, list(state.fitted), list(state.held))
        sums.add(last.inputs, targets, len(params[last.weight]))
        weight, bias, ridge = sums.solved()
        made = Solved({last.weight: weight.to(params[last.weight].dtype)})
        if last.bias is not None:
            made[last.bias] = bias.to(params[last.bias].dtype)
        info = {"variance": torch.zeros(()), "ridge": torch.tensor(ridge)}
        return Estimate(made, last.loss, oracle.queries - start, info), sums

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]
