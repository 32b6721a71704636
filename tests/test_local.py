"""Modules that learn from their own inputs: who is asked, on what, when, and what it costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocators import Uniform
from fwdlearn.batch import Batch
from fwdlearn.data import Data, DataInfo, Rows
from fwdlearn.errors import UsageError
from fwdlearn.estimators import ActivityNodePerturbation
from fwdlearn.local import learn_locally, local_rows
from fwdlearn.models import decorrelated
from fwdlearn.objectives import mean_squared_error
from fwdlearn.trainer import Trainer


class Counting(nn.Module):
    """Adds what it has seen to what it puts out."""

    seen: Tensor

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("seen", torch.zeros(()))
        self.shapes: list[torch.Size] = []

    def learn_from(self, inputs: Tensor) -> None:
        assert not torch.is_grad_enabled()
        self.shapes.append(inputs.shape)
        self.seen += inputs.sum()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training or not self.shapes
        return x + self.seen


def test_each_sees_the_first_rows_of_the_model_as_it_was() -> None:
    model = nn.Sequential(Counting(0.3), Counting(0.1)).eval()
    batch = Batch((torch.arange(1.0, 9.0).view(8, 1),), torch.zeros(8))
    assert local_rows(model, 8) == 3
    assert learn_locally(model, batch) == 3
    # 1 + 2 + 3; the second sees what the first put out before it had learned.
    assert [float(module.seen) for module in model] == [6.0, 6.0]
    assert model[0].shapes == model[1].shapes == [(3, 1)]
    learn_locally(model, batch)
    assert [float(module.seen) for module in model] == [12.0, 6.0 + 6.0 + 18.0]
    assert not model[0]._forward_hooks


def test_who_is_met_again_and_again_learns_once_from_all() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counting = Counting(1.0)

        def forward(self, x: Tensor) -> Tensor:
            first = self.counting(x)
            return self.counting(first.clone().add_(1))

    model = Steps().eval()
    learn_locally(model, Batch((torch.arange(1.0, 5.0).view(4, 1),), torch.zeros(4)))
    assert model.counting.shapes == [(8, 1)]
    assert float(model.counting.seen) == 10.0 + 14.0


def test_nobody_is_asked_where_nobody_learns() -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a pass was run")

    model = nn.Linear(2, 2)
    model.register_forward_pre_hook(never)
    assert learn_locally(model, Batch((torch.ones(4, 2),), torch.zeros(4))) == 0


def trainer(**settings: Any) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, generator=generator), torch.randn(40, 1, generator=generator)
    data = Data(DataInfo("features", (3,), None), Rows(x, y), Rows(x, y))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1)).eval()
    model = decorrelated(model, lr=0.05, share=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    parts = (mean_squared_error, ActivityNodePerturbation(), Uniform(2), optimizer)
    return Trainer(model, data, *parts, batch_size=10, **settings)


def test_a_trainer_lets_them_learn_and_counts_it() -> None:
    one = trainer(steps=6, train_mode=True)
    summary = one.train()
    # Two directions and a clean pass for each of ten rows, and half of them once more.
    assert summary["queries"] == 6 * (30 + 5)
    assert summary["forwards"] == 6 * 3.5
    matrices = [one.model[i].decorrelation.matrix for i in (0, 2)]
    assert all((matrix - torch.eye(len(matrix))).abs().max() > 1e-3 for matrix in matrices)
    again = trainer(steps=6, train_mode=True)
    again.train()
    same = again.model.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in one.model.state_dict().items())


def test_a_budget_holds_what_they_take() -> None:
    assert trainer(queries=35 * 4 + 34).train()["steps"] == 4
    with pytest.raises(UsageError, match="less than one step, which takes 35 queries"):
        trainer(queries=34)


def test_explain_teaches_nobody() -> None:
    one = trainer(steps=6)
    before = copy.deepcopy(one.model.state_dict())
    assert one.explain()["queries_per_step"] == 35
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
