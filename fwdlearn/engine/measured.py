"""What a pass at the unperturbed point tells of each row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fwdlearn.objectives import residual


@dataclass(frozen=True)
class Measured:
    """A pass at the unperturbed point.

    Args:
        losses: [rows].
        residual: [rows], see `objectives.residual`, or None where it was not asked for.
    """

    losses: Tensor
    residual: Tensor | None = None

    @classmethod
    def of(cls, losses: Tensor, outputs: Iterable[tuple[object, Tensor]]) -> Measured:
        """With the residual of some outputs and targets, which together are the batch's."""
        return cls(losses, torch.cat([residual(*pair) for pair in outputs]))
