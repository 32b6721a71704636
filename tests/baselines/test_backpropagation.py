"""The baseline: autograd's own gradient, counted as it says, in the same loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fwdlearn.allocators import Uniform
from fwdlearn.baselines import Backpropagation, BaselineTrainer, ReverseOracle, is_baseline
from fwdlearn.batch import Batch
from fwdlearn.blackbox import BlackBox
from fwdlearn.data import Data, DataInfo, Rows
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.estimators import SPSA
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy, returned, zero_one
from fwdlearn.oracle import ModelOracle, forbid_backward
from fwdlearn.recipe.build import build
from fwdlearn.recipe.load import load_recipe
from fwdlearn.trainer import Trainer

TEXT = """\
model: {name: mlp, hidden: [8]}
data: {name: digits}
estimator: {name: "fwdlearn.baselines:Backpropagation"}
optimizer: {name: Adam, lr: 1e-2}
trainer: {batch_size: 16, steps: 12, device: cpu}
"""


def _work() -> tuple[nn.Module, Batch]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).eval()
    x = torch.randn(6, 5, generator=generator)
    return model, Batch((x,), torch.arange(6) % 3)


def test_the_gradient_is_autograds_and_a_row_counts_three() -> None:
    model, batch = _work()
    oracle = ReverseOracle(Engine(model, cross_entropy), batch)
    plan, _ = Uniform(2).allocate(6, {}, None, key=Key.root(0))
    estimator = Backpropagation()
    estimate, _ = estimator.estimate(oracle, oracle.params, None, key=Key.root(0), plan=plan)
    cross_entropy(model(*batch.args), batch.targets).mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(estimate.grad[name], parameter.grad)
    assert estimate.queries == oracle.queries == estimator.traits.queries(plan) == 18
    assert not estimate.loss.requires_grad


def test_dropout_masks_are_those_of_the_forward_methods() -> None:
    model, batch = _work()
    model.train()
    engine, key = Engine(model, cross_entropy), Key.root(1)
    before = torch.get_rng_state()
    _, loss = ReverseOracle(engine, batch, key).gradient()
    asked = ModelOracle(engine, batch, key).losses(torch.arange(6))
    assert torch.allclose(loss, asked.mean())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_recipe_trains_as_a_loop_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT, "utf-8")
    trainer, twin = build(load_recipe(str(path))), build(load_recipe(str(path)))
    assert isinstance(trainer, BaselineTrainer)
    summary = trainer.train()
    assert summary["queries"] == 12 * 3 * 16
    assert summary["engine.rung"] == "baseline"
    for step in range(12):
        batch = twin.batch(step)
        twin.optimizer.zero_grad()
        cross_entropy(twin.model(*batch.args), batch.targets).mean().backward()
        twin.optimizer.step()
    for ours, theirs in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_the_baseline_is_one() -> None:
    assert is_baseline(Backpropagation()) and not is_baseline(SPSA())


def test_forward_only_stays_forward_only() -> None:
    model, batch = _work()
    with forbid_backward(), pytest.raises(Exception, match="a backward pass was asked for"):
        ReverseOracle(Engine(model, cross_entropy), batch).gradient()
    data = Data(DataInfo("features", (5,), 3), Rows(batch.args[0], batch.targets))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="Backpropagation needs GradientOracle"):
        Trainer(model, data, cross_entropy, Backpropagation(), Uniform(1), optimizer, steps=1)


def test_losses_without_a_derivative_are_refused() -> None:
    model, batch = _work()
    with pytest.raises(UsageError, match="needs a loss with a derivative"):
        ReverseOracle(Engine(model, zero_one), batch).gradient()


def test_black_boxes_are_refused() -> None:
    _, batch = _work()
    params = {"a": torch.zeros(())}
    box = BlackBox(params, lambda given, rows: rows.args[0][:, 0] * given["a"])
    data = Data(DataInfo("features", (5,), 3), Rows(batch.args[0], batch.targets))
    optimizer = torch.optim.SGD(box.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="a black box only answers"):
        BaselineTrainer(box, data, returned, Backpropagation(), Uniform(1), optimizer, steps=1)
