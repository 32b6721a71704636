"""Exact slopes along noise at the outputs of layers: against differences, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.errors import BackwardError, UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import SiteNoise
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle


class Convolutional(nn.Module):
    """An embedding, a convolution, a normalisation, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.conv(self.table(x).transpose(1, 2)).transpose(1, 2))
        q, k, v = self.qkv(inner).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(torch.tanh(inner + mixed).mean(1))


def oracle_of(model: nn.Module, batch: Batch) -> Any:
    return ModelOracle(Engine(model, cross_entropy), batch)


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slopes_are_the_limit_of_differences(law: str, dtype: torch.dtype) -> None:
    tokens = (Key.root(3).uniform(25, "tokens") * 7).long().view(5, 5)
    batch = Batch((tokens,), torch.tensor([0, 1, 2, 0, 1]))
    oracle = oracle_of(Convolutional().to(dtype), batch)
    row, index = torch.tensor([0, 0, 1, 4, 3, 2]), torch.tensor([0, 3, 3, 1, 2, 4])
    noise = SiteNoise(Key.root(1), oracle.sites, 5, law, {"conv.weight": 0.5})
    losses, slopes = oracle.noisy_slopes(row, noise, index)
    assert oracle.queries == 6
    assert losses.dtype == slopes.dtype == dtype
    torch.testing.assert_close(losses, oracle.losses(row))
    size = 1e-5 if dtype == torch.float64 else 1e-2
    sides = [oracle.noisy_losses(row, noise, index, side * size) for side in (1, -1)]
    tolerance = 1e-7 if dtype == torch.float64 else 5e-3
    differences = (sides[0] - sides[1]) / (2 * size)
    torch.testing.assert_close(slopes, differences, rtol=tolerance, atol=tolerance)


class Hidden(nn.Module):
    """Its middle layer hides, or breaks, its derivative."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.how = nn.Linear(4, 5), nn.Linear(5, 3), how

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(x)
        if self.how == "detach":
            inner = inner.detach()
        if self.how == "threshold":
            return self.last(inner).sign()
        if self.how == "backward":
            with torch.enable_grad():
                leaf = inner.detach().requires_grad_()
                torch.autograd.grad(leaf.square().sum(), leaf)
        return self.last(inner)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("detach", "Hidden gives no exact slopes along activation noise: its slopes differ from"),
        ("threshold", "Choose an estimator that needs losses alone"),
    ],
)
def test_models_that_hide_their_derivative_are_refused(how: str, message: str) -> None:
    batch = Batch((torch.ones(3, 4) * torch.tensor([[1.0], [-2.0], [0.5]]),), torch.arange(3))
    oracle = oracle_of(Hidden(how), batch)
    row = torch.arange(3)
    noise = SiteNoise(Key.root(1), oracle.sites, 3)
    with pytest.raises(UsageError, match=re.escape(message)):
        oracle.noisy_slopes(row, noise, row)


def test_nothing_runs_backward() -> None:
    batch = Batch((torch.ones(3, 4),), torch.arange(3))
    model = Hidden("")
    oracle = oracle_of(model, batch)
    noise, row = SiteNoise(Key.root(1), oracle.sites, 3), torch.arange(3)
    model.how = "backward"
    with pytest.raises(BackwardError):
        oracle.noisy_slopes(row, noise, row)
