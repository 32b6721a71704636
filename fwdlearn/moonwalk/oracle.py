"""What a trainer would ask for: the exact gradient of a batch, from a model whose parts are known.

Losses at perturbed points are not enough for Moonwalk, and directions are of no use to it, so it
is no LossOracle. It asks one question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.errors import UsageError
from fwdlearn.moonwalk.chain import Chain
from fwdlearn.moonwalk.walk import Moonwalk
from fwdlearn.oracle import forbid_backward


@runtime_checkable
class GradientOracle(Protocol):
    """Answers with exact gradients."""

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Name -> trainable tensor, read only."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""

    @property
    def queries(self) -> int:
        """Forward passes of one row, so far."""

    def gradients(self, weight: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses [rows], and name -> gradient of the sum of `weight` [rows] times losses."""


class ChainOracle:
    """A GradientOracle on a chain and a batch: walks, forbids backward, counts.

    Args:
        chain: the model.
        batch: one input and the targets.
        objective: (output, targets) -> losses [rows], each from its own row alone.
        settings: how to walk.

    Raises:
        UsageError: the batch has other inputs than one.
    """

    def __init__(
        self,
        chain: Chain,
        batch: Batch,
        objective: Callable[[Any, Tensor], Tensor],
        settings: Moonwalk | None = None,
    ) -> None:
        if len(batch.args) != 1 or batch.kwargs:
            raise UsageError(
                f"ChainOracle needs batches of one input, got {len(batch.args)} and "
                f"{len(batch.kwargs)} by name."
            )
        self._chain, self._batch, self._objective = chain, batch, objective
        self._settings = settings or Moonwalk()
        self._evaluations = 0

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Name -> trainable tensor, read only."""
        named = self._chain.named_parameters()
        return {name: value.detach() for name, value in named if value.requires_grad}

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self._batch)

    @property
    def queries(self) -> int:
        """Forward passes of one row, so far; a part of the layers counts as a part of a pass."""
        return -(-self._evaluations * self.rows // len(self._chain.parts))

    def gradients(self, weight: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See `GradientOracle.gradients`. A `Walk` streams them where memory is short."""
        x, targets = self._batch.args[0], self._batch.targets
        walk = self._settings.walk(
            self._chain, x, lambda output: self._objective(output, targets), weight
        )
        with forbid_backward():
            found = dict(walk)
        self._evaluations += walk.evaluations
        if walk.losses is None:
            raise UsageError("ChainOracle(chain=...) has no trainable parameter.")
        return walk.losses, found
