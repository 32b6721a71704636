"""A batch of rows: what the model is called with, and what its output is compared to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows for `model(*args, **kwargs)` and their targets.

    Args:
        args: positional inputs, each with the rows as dimension 0.
        kwargs: keyword inputs, each with the rows as dimension 0.
        targets: [rows, ...] what the objective compares the output to.
        passes: queries that one call of the model counts for a row: more than one where a row is
            several sequences, or is gone on with token by token.
    """

    args: tuple[Tensor, ...]
    targets: Tensor
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    passes: int = 1

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def device(self) -> torch.device:
        return self.targets.device

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """Applies `f` to every tensor."""
        kwargs = {name: f(value) for name, value in self.kwargs.items()}
        args = tuple(f(value) for value in self.args)
        return replace(self, args=args, targets=f(self.targets), kwargs=kwargs)

    def select(self, index: Tensor) -> Batch:
        """The rows `index` (int64 [n]), in that order; rows may repeat."""
        return self.map(lambda value: value.index_select(0, index))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """On `device`; floating inputs (not the targets) in `dtype` when it is given."""

        def move(value: Tensor) -> Tensor:
            if dtype is not None and value.is_floating_point():
                return value.to(device, dtype)
            return value.to(device)

        kwargs = {name: move(value) for name, value in self.kwargs.items()}
        args = tuple(move(value) for value in self.args)
        return replace(self, args=args, targets=self.targets.to(device), kwargs=kwargs)
