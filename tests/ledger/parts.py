"""A model in short floats, for runs that are killed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fwdlearn.models import mlp


class Short(nn.Module):
    """A network whose weights are bfloat16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16()).float()


def short(info: Any, seed: int = 0) -> nn.Module:
    """A small one."""
    return Short(mlp(info, hidden=(8,), seed=seed).module)
