"""Objectives of sequences: the mean over the steps that count, however it is put together."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fwdlearn import objectives
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine.head import by_output
from fwdlearn.engine.trace import Rows
from fwdlearn.keys import Key
from fwdlearn.oracle import ModelOracle

ROWS, STEPS = 3, 4


def numbers(*shape: int) -> Tensor:
    return Key.root(3).uniform(math.prod(shape), "test").reshape(shape) * 2 - 1


def classes() -> Tensor:
    targets = torch.arange(ROWS * STEPS).reshape(ROWS, STEPS) % 5
    targets[0, :2] = -100
    targets[2] = -100
    return targets


def values() -> Tensor:
    targets = numbers(ROWS, STEPS, 2)
    targets[0, :2] = math.nan
    targets[2] = math.nan
    return targets


CASES: list[tuple[Callable[..., Tensor], Tensor, int]] = [
    (objectives.cross_entropy, classes(), 5),
    (objectives.zero_one, classes(), 5),
    (objectives.mean_squared_error, values(), 2),
]


@pytest.mark.parametrize(("objective", "targets", "width"), CASES)
def test_a_sequence_costs_the_mean_over_steps_that_count(
    objective: Any, targets: Tensor, width: int
) -> None:
    output = numbers(ROWS, STEPS, width)
    found = objective(output, targets)
    one = objective(output[1], targets[1]).mean()
    two = objective(output[0, 2:], targets[0, 2:]).mean()
    torch.testing.assert_close(found, torch.stack((two, one, torch.zeros_like(one))).to(found))


@pytest.mark.parametrize(("objective", "targets", "width"), CASES)
def test_shares_of_steps_add_up_to_the_loss(objective: Any, targets: Tensor, width: int) -> None:
    output = numbers(ROWS, STEPS, width)
    assert objectives.per_step(targets)
    weights = objectives.step_weights(targets)
    parts = [
        objectives.at_step(objective, output[:, t], targets[:, t], weights[:, t])
        for t in range(STEPS)
    ]
    torch.testing.assert_close(sum(parts), objective(output, targets), check_dtype=False)


def test_a_row_of_values_is_no_sequence() -> None:
    targets = numbers(ROWS, 2)
    assert not objectives.per_step(targets) and not objectives.per_step(classes()[:, 0])
    expected = (0.5 - targets).square().mean(1)
    found = objectives.mean_squared_error(torch.full_like(targets, 0.5), targets)
    torch.testing.assert_close(found, expected.to(found))


def test_an_output_that_is_not_finite_does_not_hide() -> None:
    output = numbers(ROWS, STEPS, 2)
    output[1, 0, 0] = math.nan
    assert objectives.mean_squared_error(output, values()).isnan().tolist() == [False, True, False]


def test_what_is_not_counted_has_no_slope() -> None:
    model = torch.nn.Linear(4, 5)
    x = numbers(ROWS, STEPS, 4).float()
    for objective, targets, width in CASES:
        if objective is objectives.zero_one:
            continue
        answers = []
        for rung in ("fold", "sequential"):

            def asked(output: Any, wanted: Tensor, of: Any = objective, n: int = width) -> Tensor:
                losses: Tensor = of(output[..., :n], wanted)
                return losses

            wanted = targets.float() if targets.is_floating_point() else targets
            oracle = ModelOracle(Engine(model, asked, rung), Batch((x,), wanted))
            directions = Directions(Key.root(0), oracle.params, 2)
            which = (torch.arange(2), directions, torch.arange(2))
            answers.append(oracle.slopes(*which)[1])
            up, down = oracle.losses(*which, 1e-2), oracle.losses(*which, -1e-2)
            torch.testing.assert_close(answers[-1], (up - down) / 2e-2, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(*answers)


SMOOTH = partial(objectives.cross_entropy, label_smoothing=0.1)


@pytest.mark.parametrize("objective", [objectives.cross_entropy, SMOOTH])
@pytest.mark.parametrize("targets", [classes(), torch.tensor([4, 0, 2])])
def test_derivatives_by_formula_are_those_of_forward_mode(objective: Any, targets: Tensor) -> None:
    output = numbers(*targets.shape, 5)
    found = objectives.by_formula(objective, output, targets)
    assert found is not None
    wanted = by_output(lambda value: objective(value, targets), output, ROWS, Rows(0))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    assert float(found[0].abs().max()) > 0


def test_a_derivative_without_a_formula_is_not_made_up() -> None:
    for objective in (objectives.zero_one, objectives.mean_squared_error, lambda *_: None):
        assert objectives.by_formula(objective, numbers(ROWS, 5), torch.zeros(ROWS).long()) is None
