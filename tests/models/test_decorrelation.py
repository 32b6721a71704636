"""Decorrelation: the rule by hand, what it does, its place in models, and how it goes away."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.estimators import ActivityNodePerturbation, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.local import learn_locally
from fwdlearn.models import Decorrelation, decorrelated, fold_into_weights
from fwdlearn.models.built import weights_from
from fwdlearn.oracle import ModelOracle


def correlated(rows: int = 64, features: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=generator).double() / features**0.5
    return torch.randn(rows, features, generator=generator).double() @ mix


def test_one_step_by_hand() -> None:
    """Two features, written out: the variance term scales rows of R, not columns."""
    layer = Decorrelation(2, lr=0.1, kappa=0.25).double()
    layer.matrix.copy_(torch.tensor([[1.0, 0.5], [0.2, 2.0]], dtype=torch.float64))
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    # R x: (2, 4.2) and (2.5, -1.4).
    cross = (2 * 4.2 + 2.5 * -1.4) / 2
    v = ((4 + 6.25) / 2 - 1, (4.2**2 + 1.4**2) / 2 - 1)
    push = [
        [0.75 * cross * 0.2 + 0.25 * v[0] * 1.0, 0.75 * cross * 2.0 + 0.25 * v[0] * 0.5],
        [0.75 * cross * 1.0 + 0.25 * v[1] * 0.2, 0.75 * cross * 0.5 + 0.25 * v[1] * 2.0],
    ]
    expected = layer.matrix - 0.1 * torch.tensor(push, dtype=torch.float64)
    layer.learn_from(x)
    torch.testing.assert_close(layer.matrix, expected, rtol=1e-14, atol=0)


def test_it_whitens() -> None:
    x = correlated()
    layer = Decorrelation(4, lr=0.05, kappa=0.5).double()
    for _ in range(3000):
        layer.learn_from(x)
    out = layer(x)
    torch.testing.assert_close(out.T @ out / len(x), torch.eye(4).double(), rtol=0, atol=1e-6)


def test_without_kappa_correlations_vanish_alone() -> None:
    x = correlated()
    layer = Decorrelation(4, lr=0.05, kappa=0).double()
    for _ in range(3000):
        layer.learn_from(x)
    covariance = layer(x).T @ layer(x) / len(x)
    off = covariance - covariance.diagonal().diag()
    assert off.abs().max() < 1e-6
    assert (covariance.diagonal() - 1).abs().max() > 0.1


class Mixed(nn.Module):
    """A convolution with stride and padding, and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.layer = nn.Linear(27, 27)
        self.again = self.layer
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(27, 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.convolution(x).flatten(1).tanh())
        return self.head(self.again(x.tanh()))


def mixed() -> tuple[nn.Module, Batch]:
    with weights_from(2):
        return Mixed().eval(), Batch((torch.randn(8, 2, 6, 6),), torch.zeros(8))


def learned(steps: int = 5, **settings: Any) -> tuple[nn.Module, nn.Module, Batch]:
    """A model, the same with decorrelations that have learned, and a batch."""
    model, batch = mixed()
    made = decorrelated(model, **{"lr": 0.05, "share": 1.0, **settings})
    torch.testing.assert_close(made(*batch.args), model(*batch.args), rtol=0, atol=1e-6)
    for _ in range(steps):
        learn_locally(made, batch)
    return model, made, batch


def test_folding_leaves_the_outputs_and_takes_the_names_back() -> None:
    model, made, batch = learned()
    before, kept = made(*batch.args), copy.deepcopy(made.state_dict())
    assert (before - model(*batch.args)).abs().max() > 1e-3
    folded = fold_into_weights(made)
    torch.testing.assert_close(folded(*batch.args), before, rtol=0, atol=1e-6)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert type(folded.head[1]) is nn.Linear and folded.again is folded.layer
    # A copy: what it was made from still learns.
    assert all(torch.equal(value, kept[name]) for name, value in made.state_dict().items())
    assert learn_locally(folded, batch) == 0 and learn_locally(made, batch) == 8


def test_patches_of_a_convolution_lose_their_correlations() -> None:
    _, made, batch = learned(steps=0, lr=0.1, kappa=0.0)
    module = made.convolution

    def correlation() -> float:
        patches = torch.nn.functional.unfold(batch.args[0], 3, 1, 1, 2).mT.flatten(0, 1)
        out = module.decorrelation(patches)
        covariance = out.T @ out / len(out)
        return float((covariance - covariance.diagonal().diag()).square().sum())

    first = correlation()
    for _ in range(50):
        learn_locally(made, batch)
    assert correlation() < 0.05 * first


@pytest.mark.parametrize("estimator", [RandomPerturbation(), ActivityNodePerturbation()])
def test_forward_only_estimates_follow_autograd(estimator: Any) -> None:
    """Through the fold and through local products: many queries of a linear loss, so that the mean
    of the estimate lies along the gradient as far as their number allows."""
    _, batch = mixed()
    with weights_from(3):
        first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        plain = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(27, 9), nn.Linear(9, 2))
    made = decorrelated(plain, lr=0.05, share=1.0).eval()
    for _ in range(5):
        learn_locally(made, batch)
    made, batch = made.double(), batch.to("cpu", torch.float64)
    engine = Engine(made, lambda output, targets: output.sum(1))
    oracle = ModelOracle(engine, batch)
    plan = Plan.uniform(8, 1000)
    estimate, _ = estimator.estimate(oracle, oracle.params, None, key=Key.root(0), plan=plan)
    loss = made(*batch.args).sum(1).mean()
    params = dict(made.named_parameters())
    exact = torch.autograd.grad(loss, list(params.values()))
    one = torch.cat([g.flatten() for g in exact])
    other = torch.cat([estimate.grad[name].flatten() for name in params])
    # 8,000 directions: of 329 weights, or of 38 outputs.
    assert torch.cosine_similarity(one, other, 0) > 0.9


def test_what_stays_as_it_is() -> None:
    with weights_from(0):
        layers = nn.ModuleDict(
            {
                "attention": nn.MultiheadAttention(4, 2),
                "grouped": nn.Conv2d(4, 4, 3, groups=2),
                "reflected": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
                "same": nn.Conv2d(4, 4, 3, padding="same"),
                "plain": nn.Linear(4, 4),
            }
        )
    made = decorrelated(layers)
    changed = [name for name in layers if type(made[name]) is not type(layers[name])]
    assert changed == ["plain"]
    assert type(made.attention.out_proj) is type(layers.attention.out_proj)
    # Twice is once.
    with pytest.raises(UsageError, match="finds no nn.Linear and no plain nn.Conv2d"):
        decorrelated(made)


def test_mistakes_are_named() -> None:
    for settings, message in (
        ({"lr": 0.0}, r"Decorrelation\(lr=...\) must be positive, got 0.0"),
        ({"kappa": 1.5}, r"Decorrelation\(kappa=...\) must be between 0 and 1, got 1.5"),
        ({"share": 0.0}, r"Decorrelation\(share=...\) must be above 0 and at most 1, got 0.0"),
    ):
        with pytest.raises(UsageError, match=message):
            Decorrelation(3, **settings)
    with pytest.raises(UsageError, match="0 is a Decorrelation without a layer of its own"):
        fold_into_weights(nn.Sequential(Decorrelation(3), nn.Tanh()))
