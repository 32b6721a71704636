"""Noise that rounding swallows is refused before a step is taken."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from fwdlearn.allocators import Uniform
from fwdlearn.errors import UsageError
from fwdlearn.estimators import SPSA, LikelihoodRatio, NodePerturbation, RandomPerturbation
from fwdlearn.models import mlp
from fwdlearn.objectives import zero_one
from tests.ledger.parts import Short
from tests.test_trainer import Memory, tiny, trainer, weights


def _short(seed: int = 0) -> nn.Module:
    return Short(mlp(tiny().info, hidden=(8,), seed=seed).module)


@pytest.mark.parametrize(
    "estimator",
    [
        RandomPerturbation(1e-7),
        SPSA(1e-7),
        RandomPerturbation(1e-7, rank=None),
        NodePerturbation(1e-7),
    ],
    ids=repr,
)
def test_sigma_below_the_resolution_names_one_that_works(estimator: Any) -> None:
    sink = Memory()
    run = trainer(_short(), estimator=estimator, sinks=[sink])
    before = weights(run.model)
    name = type(estimator).__name__
    with pytest.raises(UsageError, match=rf"{name}\(sigma=1e-07\) is below the resolut") as caught:
        run.train()
    assert torch.equal(weights(run.model), before) and not sink.records
    found = re.search(r"the smallest that does is about ([0-9.e-]+)\.$", str(caught.value))
    assert found is not None
    sigma = float(found[1])
    assert 1e-4 < sigma < 0.5
    # It works as it says: twice as much gives the same slopes, on batches not seen before.
    sizes = []
    for factor in (1, 2):
        louder = type(estimator)(sigma * factor)
        other = trainer(_short(), estimator=louder, allocator=Uniform(16), steps=20)
        made = [other._estimate(step, None, None)[0].estimate for step in range(5, 9)]
        sizes.append(sum(float(one.info["coef_abs"]) for one in made))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.25)


def test_the_same_sigma_in_longer_floats_is_none_of_its_business() -> None:
    model = mlp(tiny().info, hidden=(8,)).module.double()
    run = trainer(Doubled(model), estimator=SPSA(1e-7), steps=2)
    assert run.train()["status"] == "finished"


class Doubled(nn.Module):
    """Computes in float64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.double())


def test_a_loss_with_plateaus_is_no_matter_of_resolution() -> None:
    run = trainer(objective=zero_one, estimator=RandomPerturbation(1e-4), steps=2)
    assert run.train()["status"] == "finished"


def test_an_output_that_depends_on_nothing() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :4] + 0 * self.inner(x)

    with pytest.raises(UsageError, match="its output does not depend on what is perturbed"):
        trainer(Deaf(), rung="sequential").train()


def test_an_exact_head_alone_is_not_lost_noise() -> None:
    """Where the head is all there is to train, nothing gets noise and nothing is missing."""
    model = mlp(tiny().info, hidden=(8,), seed=0).module
    for parameter in [*model.parameters()][:-2]:
        parameter.requires_grad_(False)
    run = trainer(model, estimator=LikelihoodRatio(), steps=3)
    batch = run.batch(0)
    loss = run.objective(model(*batch.args), batch.targets).mean()
    expected = torch.autograd.grad(loss, [*run.engine.params.values()])
    estimate = run.estimate()
    found = tuple(estimate.grad[name] for name in run.engine.params)
    torch.testing.assert_close(found, expected)
    assert estimate.queries == len(batch)
    before = weights(model)
    run.train()
    assert not torch.equal(weights(model), before)
