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


class Words(nn.Module):
    """Pixels as words of a table of which a batch reads some."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(64 * 17, 4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        words = 17 * torch.arange(64, device=x.device) + (16 * x).long().flatten(1)
        return self.layer(self.table(words).mean(1).relu())


def words(info: Any, seed: int = 0) -> nn.Module:
    """A small one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Words()


def counted(info: Any, path: str, seed: int = 0) -> nn.Module:
    """A small one."""
    return Counted(mlp(info, hidden=(4,), seed=seed).module, path)


def short(info: Any, seed: int = 0) -> nn.Module:
    """A small one."""
    return Short(mlp(info, hidden=(8,), seed=seed).module)
