"""Baselines through time: credit flows where it should, is cut where it should; ridge readouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.allocators import Uniform
from fwdlearn.baselines import (
    Backpropagation,
    BaselineTrainer,
    ReverseOracle,
    TruncatedBackpropagation,
    fit_readout,
    is_baseline,
    reservoir,
)
from fwdlearn.batch import Batch
from fwdlearn.data import adding_problem, delayed_recall
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimator
from fwdlearn.keys import Key
from fwdlearn.models import Recurrent, recurrent
from fwdlearn.objectives import mean_squared_error

RECALL = delayed_recall(steps=20, delay=5, values=2)
SUM = adding_problem(steps=20)


def _gradient(model: nn.Module, batch: Batch, estimator: Estimator) -> Mapping[str, Tensor]:
    oracle = ReverseOracle(Engine(model, mean_squared_error), batch)
    plan = Plan.uniform(len(batch), 1)
    estimate, _ = estimator.estimate(oracle, oracle.params, None, key=Key.root(0), plan=plan)
    assert estimate.queries == oracle.queries == 3 * len(batch)
    expected = mean_squared_error(model(*batch.args), batch.targets).mean()
    torch.testing.assert_close(estimate.loss, expected.detach(), rtol=1e-5, atol=1e-6)
    return {name: estimate.grad[name] for name in oracle.params}


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), 0))


def _tanh(data: Any = RECALL, width: int = 16) -> Recurrent:
    model = recurrent(data.info, "elman", (width,), seed=3).module.double()
    assert isinstance(model, Recurrent)
    # A gain of one: what came in is felt for a while.
    weight = model.cells[0].recurrent.weight
    nn.init.normal_(weight, 0, width**-0.5, generator=torch.Generator().manual_seed(0))
    return model


def _batch(data: Any = RECALL) -> Batch:
    batch: Batch = data.train.batch(torch.arange(32))
    return batch.map(lambda value: value.double() if value.is_floating_point() else value)


def test_credit_flows_through_time() -> None:
    """A baseline that detaches its state passes for BPTT wherever nobody looks."""
    model, batch = _tanh(), _batch()
    whole = _gradient(model, batch, Backpropagation())
    cut = _gradient(model, batch, TruncatedBackpropagation(1))
    name = "cells.0.recurrent.weight"
    assert _cosine(whole[name], cut[name]) < 0.95
    # The readout knows nothing of time.
    torch.testing.assert_close(whole["head.weight"], cut["head.weight"])
    # Of what came in before the step that is asked, by differences and without any graph.
    bump = torch.zeros_like(whole[name])
    bump[3, 5] = 1e-6
    weight = model.cells[0].recurrent.weight
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * bump
            losses.append(mean_squared_error(model(*batch.args), batch.targets).mean())
            weight -= sign * bump
    assert float(losses[0] - losses[1]) / 2e-6 == pytest.approx(float(whole[name][3, 5]), rel=1e-5)


def test_one_step_is_the_gradient_with_a_detached_state() -> None:
    model, batch = _tanh(), _batch()
    found = _gradient(model, batch, TruncatedBackpropagation(1))
    state, out = model.initial(32), []
    for x_t in batch.args[0].unbind(1):
        y, state = model.step(x_t, {name: value.detach() for name, value in state.items()})
        out.append(y)
    mean_squared_error(torch.stack(out, 1), batch.targets).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("data", [RECALL, SUM])
def test_a_cut_after_the_end_cuts_nothing(data: Any) -> None:
    model, batch = _tanh(data), _batch(data)
    whole = _gradient(model, batch, Backpropagation())
    for name, value in _gradient(model, batch, TruncatedBackpropagation(20)).items():
        torch.testing.assert_close(value, whole[name])
    name = "cells.0.recurrent.weight"
    cosines = [
        _cosine(_gradient(model, batch, TruncatedBackpropagation(k))[name], whole[name])
        for k in (1, 5, 10)
    ]
    assert cosines == sorted(cosines) and cosines[0] < 0.95


def test_the_truncated_baseline_trains_like_the_other() -> None:
    assert is_baseline(TruncatedBackpropagation())
    model = recurrent(RECALL.info, hidden=(8,)).module
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    parts = (mean_squared_error, TruncatedBackpropagation(8), Uniform(1), optimizer)
    summary = BaselineTrainer(model, RECALL, *parts, batch_size=16, steps=60).train()
    assert summary["eval.nmse"] < 0.9 and summary["queries"] == 60 * 3 * 16


def test_models_without_steps_are_refused() -> None:
    batch = Batch((torch.ones(2, 3),), torch.zeros(2, 1))
    with pytest.raises(UsageError, match="needs a model that goes through one sequence step by"):
        _gradient(nn.Linear(3, 1), batch, TruncatedBackpropagation())
    with pytest.raises(ValueError, match=r"TruncatedBackpropagation\(steps=...\) must be at least"):
        TruncatedBackpropagation(0)


def test_a_reservoir_has_the_radius_and_recalls() -> None:
    model = reservoir(RECALL.info, 40, radius=0.9, scale=0.1)
    (cell,) = model.cells
    values = torch.linalg.eigvals(cell.recurrent.weight.detach().double()).abs()
    assert float(values.max()) == pytest.approx(0.9, rel=1e-5)
    assert 0.08 < float(cell.input.weight.detach().abs().max()) <= 0.1
    frozen = [value.clone() for value in cell.parameters()]
    batches = [RECALL.train.batch(torch.arange(32) + 32 * i) for i in range(40)]
    fit_readout(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(frozen, cell.parameters(), strict=True))
    held = RECALL.train.batch(torch.arange(256) + 10**6)
    with torch.no_grad():
        losses = mean_squared_error(model(*held.args), held.targets)
    # The variance of a uniform value in [-1, 1) is 1/3.
    assert float(losses.mean()) < 0.3 / 3
    with pytest.raises(UsageError, match="needs at least four batches, got 2"):
        fit_readout(model, batches[:2])


def test_the_readout_is_the_least_squares_one() -> None:
    model = reservoir(SUM.info, 6).double()
    batches = [_batch(SUM) for _ in range(4)]
    fit_readout(model, batches, ridges=(1e-13,))
    with torch.no_grad():
        out, wanted = model(*batches[0].args), batches[0].targets
        # Residuals of a least-squares fit are uncorrelated with what it was made of.
        state = model.initial(32)
        for x_t in batches[0].args[0].unbind(1):
            _, state = model.step(x_t, state)
        made_of = torch.cat((state["0.h"], torch.ones(32, 1).double()), 1)
        assert float((made_of.T @ (out - wanted)).abs().max()) < 1e-6
