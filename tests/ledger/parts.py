"""A model in short floats, for runs that are killed."""

from __future__ import annotations

import time
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


class Counted(nn.Module):
    """Takes a while, and notes every pass in a file.

    Args:
        inner: the network.
        path: gets a byte a pass.
    """

    def __init__(self, inner: nn.Module, path: str) -> None:
        super().__init__()
        self.inner, self.path = inner, path

    def forward(self, x: Tensor) -> Tensor:
        with open(self.path, "ab") as file:
            file.write(b".")
        time.sleep(0.3)
        return self.inner(x)


def counted(info: Any, path: str, seed: int = 0) -> nn.Module:
    """A small one."""
    return Counted(mlp(info, hidden=(4,), seed=seed).module, path)


def short(info: Any, seed: int = 0) -> nn.Module:
    """A small one."""
    return Short(mlp(info, hidden=(8,), seed=seed).module)
