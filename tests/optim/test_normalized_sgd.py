"""NormalizedSGD: steps that do not depend on the scale of the loss, from numbers that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fwdlearn.allocators import Blocks, Uniform
from fwdlearn.errors import UsageError
from fwdlearn.estimators import LOZO, SPSA, LikelihoodRatio, RandomPerturbation
from fwdlearn.models import mlp
from fwdlearn.objectives import cross_entropy
from fwdlearn.optim import NormalizedSGD
from fwdlearn.trainer import Trainer
from tests.test_trainer import tiny


class Wide(nn.Module):
    """In double precision, so that differences are exact to the twelfth digit."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.double())


def trainer(factor: float = 1.0, **parts: Any) -> Trainer:
    data = tiny()
    model = Wide(mlp(data.info, hidden=(4,)).module)
    settings = parts.pop("settings", {"lr": 0.01})

    def objective(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return factor * cross_entropy(output, targets)

    made = Trainer(
        model,
        data,
        objective,
        parts.pop("estimator", RandomPerturbation(1e-3)),
        parts.pop("allocator", Uniform(4)),
        NormalizedSGD(model.parameters(), **settings),
        batch_size=8,
        steps=3,
        **parts,
    )
    return made


def weights(run: Trainer) -> torch.Tensor:
    run.train()
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize("estimator", [RandomPerturbation(1e-3), SPSA(1e-3), LOZO(1e-3)], ids=repr)
@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_the_scale_of_the_loss_changes_nothing(estimator: Any, sharing: str) -> None:
    runs = [
        trainer(factor, estimator=estimator, allocator=Uniform(4, sharing=sharing))
        for factor in (1.0, 7.0)
    ]
    one, other = (weights(run) for run in runs)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_step_is_the_gradient_over_the_standard_deviation_of_slopes() -> None:
    run = trainer(allocator=Uniform(5, sharing="shared"))
    before = {n: p.detach().clone() for n, p in run.engine.params.items()}
    made = run.estimate()
    run.steps = 1
    run.train()
    slopes = 5 * made.grad.coefficients  # type: ignore[attr-defined]
    for name, value in run.engine.params.items():
        expected = before[name] - 0.01 * made.grad[name] / slopes.std()
        torch.testing.assert_close(value.detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_length_of_a_step_is_known() -> None:
    """About lr * sqrt(d / n) for n independent directions of d numbers, whatever the loss."""
    run = trainer(allocator=Uniform(8))
    before = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    run.steps = 1
    length = float((weights(run) - before).norm())
    assert length == pytest.approx(0.01 * (len(before) / 64) ** 0.5, rel=0.25)


def test_a_block_that_was_drawn_takes_a_step_of_the_same_length() -> None:
    """What it counts, one over its probability, is divided out with the scale."""
    allocator = Blocks(("*weight", "*"), 4, rule="uniform")
    run = trainer(allocator=allocator)
    made = run.estimate()
    assert made.grad.spread == pytest.approx(2 * made.grad.gradient.spread)  # type: ignore[attr-defined]
    assert torch.isfinite(weights(run)).all()


def test_momentum_and_decay() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = NormalizedSGD([weight], lr=0.1, momentum=0.5, weight_decay=0.5, spread=2.0)
    for _ in range(2):
        weight.grad = torch.tensor([4.0])
        optimizer.step()
    # 2 * 0.95 - 0.1 * 2 = 1.7, then 1.7 * 0.95 - 0.1 * (0.5 * 2 + 2) = 1.315.
    assert float(weight.detach()) == pytest.approx(1.315)


def test_nothing_moves_where_nothing_is_known() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = NormalizedSGD([weight], spread=0.0)
    weight.grad = torch.tensor([0.0])
    optimizer.step()
    assert float(weight.detach()) == 2.0


def test_what_has_no_spread_is_refused() -> None:
    with pytest.raises(UsageError, match="made of something else; choose RandomPerturbation"):
        trainer(estimator=LikelihoodRatio()).train()
    with pytest.raises(UsageError, match="raise allocator.directions"):
        trainer(allocator=Uniform(1, sharing="shared")).train()
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.tensor([1.0])
    with pytest.raises(UsageError, match="is told the spread by a trainer"):
        NormalizedSGD([weight]).step()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lr": 0.0}, r"NormalizedSGD\(lr=...\) must be positive, got 0.0."),
        ({"momentum": 1.0}, r"NormalizedSGD\(momentum=...\) must be in \[0, 1\), got 1.0."),
        ({"weight_decay": -1.0}, r"NormalizedSGD\(weight_decay=...\) must be at least 0"),
        ({"spread": -1.0}, r"NormalizedSGD\(spread=...\) must be at least 0, or None"),
    ],
)
def test_settings_out_of_range(settings: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        trainer(settings=settings)
