"""Sign coding: what its factors make up for, and what it keeps."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.coded import FACTOR, SignedNoise
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.estimators import ApproximateLikelihoodRatio
from fwdlearn.keys import Key
from fwdlearn.noise import Output, SiteNoise
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle

SITES = {"a": Output((7, 20), torch.float32, ()), "b": Output((), torch.float64, ())}


@pytest.mark.parametrize("name", list(SITES))
def test_the_code_is_the_sign_of_the_noise(name: str) -> None:
    """Also for numbers that no pass has had, and for one that comes again."""
    noise = SignedNoise(Key.root(0), SITES, 6)
    plain = SiteNoise(Key.root(0), SITES, 6, "gaussian")
    ids, dtype = torch.tensor([4, 0, 4]), noise.dtype(name)
    factor = torch.tensor([0.5, -2.0, 1.0], dtype=dtype)
    assert torch.equal(noise.times(name, ids, factor), plain.times(name, ids, factor))
    every = torch.arange(6)
    coded = noise.times(name, every, torch.ones(6, dtype=dtype), score=True)
    exact = plain.times(name, every, torch.ones(6, dtype=dtype))
    torch.testing.assert_close(coded, FACTOR * exact.sign())


def test_one_bit_is_kept() -> None:
    noise = SignedNoise(Key.root(0), {"a": Output((128, 3), torch.float32, ())}, 10)
    noise.times("a", torch.arange(10), torch.ones(10))
    assert noise.kept_bytes == 10 * 384 / 8


def ask(estimator: ApproximateLikelihoodRatio, copies: int, number: int) -> tuple[Tensor, Tensor]:
    """The estimate and the gradient of the weights of the first layer of a small network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()
        batch = Batch((torch.randn(40, 5).double(),), torch.arange(40) % 3)
    (exact,) = torch.autograd.grad(
        cross_entropy(model(*batch.args), batch.targets).mean(), [model[0].weight]
    )
    oracle = ModelOracle(Engine(model, cross_entropy), batch)
    estimate, _ = estimator.estimate(
        oracle, oracle.params, None, key=Key.root(number), plan=Plan.uniform(40, copies)
    )
    assert estimate.queries == oracle.queries == 40 * (copies + 1)
    return estimate.grad["0.weight"], exact


@pytest.mark.parametrize(("code", "bias"), [("noise", 0.0), ("product", 0.1)])
def test_factors_make_up_for_what_signs_lose(code: str, bias: float) -> None:
    """Projected on the gradient an estimate is as long on average, to five standard errors of 20:
    for signs of noise; nearly for signs of products, as numbers are not quite jointly normal."""
    lengths = []
    for number in range(20):
        found, exact = ask(ApproximateLikelihoodRatio(1e-4, code), 20, number)  # type: ignore[arg-type]
        lengths.append((found * exact).sum() / exact.square().sum())
    length = torch.stack(lengths)
    error = float(length.std()) / math.sqrt(20)
    assert error < 0.1
    assert abs(float(length.mean()) - 1) < bias + 5 * error


def test_refusals() -> None:
    cases = {
        "ApproximateLikelihoodRatio(sigma=...) must be positive, got 0.0.": {"sigma": 0.0},
        "ApproximateLikelihoodRatio(code=...) must be 'noise' or 'product', got 'loss'.": {
            "code": "loss"
        },
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ApproximateLikelihoodRatio(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 'gaussian', got 'rademacher'"):
        SignedNoise(Key.root(0), SITES, 1, "rademacher")


class Twisted(nn.Module):
    """A parameter that no layer's output feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twist = nn.Linear(3, 2), nn.Parameter(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ torch.linalg.matrix_exp(self.twist)


def test_a_parameter_that_no_layer_feeds_is_refused() -> None:
    oracle = ModelOracle(
        Engine(Twisted(), cross_entropy), Batch((torch.ones(2, 3),), torch.tensor([0, 1]))
    )
    with pytest.raises(UsageError, match="ApproximateLikelihoodRatio cannot learn twist"):
        ApproximateLikelihoodRatio().estimate(
            oracle, oracle.params, None, key=Key.root(0), plan=Plan.uniform(2, 1)
        )
