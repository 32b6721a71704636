"""Figures of evaluations: over everything that is counted, whatever the batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fwdlearn.metrics import Scores
from fwdlearn.objectives import NOT_COUNTED, cross_entropy, mean_squared_error, zero_one

OUTPUT = torch.linspace(-1, 2, 2 * 5 * 3).view(2, 5, 3).sin()
CLASSES = torch.tensor([[0, 1, 2, 0, 1], [2, NOT_COUNTED, 0, NOT_COUNTED, NOT_COUNTED]])


def _values() -> Tensor:
    values = torch.linspace(0, 1, 30).view(2, 5, 3)
    values[1, 3:, 0] = math.nan
    return values


def test_figures_run_over_what_is_counted() -> None:
    scores = Scores()
    for row in (slice(0, 1), slice(1, 2)):
        losses = cross_entropy(OUTPUT[row], CLASSES[row])
        scores.add(losses, OUTPUT[row], CLASSES[row])
    mask = CLASSES != NOT_COUNTED
    right = (OUTPUT.argmax(-1) == CLASSES)[mask]
    nats = cross_entropy(OUTPUT[mask], CLASSES[mask])
    found = scores.result()
    assert set(found) == {"loss", "accuracy", "bits", "perplexity"}
    assert found["perplexity"] == pytest.approx(math.exp(float(nats.mean())))
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    assert found["bits"] == pytest.approx(float(nats.mean()) / math.log(2))
    assert found["loss"] == pytest.approx(float(cross_entropy(OUTPUT, CLASSES).mean()))


def test_classes_of_rows_have_an_accuracy_and_no_bits() -> None:
    scores, output, targets = Scores(), OUTPUT[:, 0], CLASSES[:, 0]
    scores.add(zero_one(output, targets), output, targets)
    right = float((output.argmax(1) == targets).double().mean())
    found = scores.result()
    assert set(found) == {"loss", "accuracy", "f1"}
    assert (found["loss"], found["accuracy"]) == (1 - right, right)


def test_f1_is_that_of_the_second_of_two_classes_and_else_a_mean() -> None:
    targets, chosen = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 1, 0, 0])
    for classes, wanted in ((2, 2 * 2 / (3 + 3)), (4, (4 / 6 + 4 / 6) / 2)):
        scores = Scores()
        for part in (slice(0, 2), slice(2, 6)):
            output = torch.eye(classes)[chosen[part]]
            scores.add(zero_one(output, targets[part]), output, targets[part])
        assert scores.result()["f1"] == pytest.approx(wanted)


def test_nmse_is_one_for_the_mean_of_the_targets() -> None:
    targets, scores = _values() * torch.tensor([1.0, 10.0, 100.0]), Scores()
    mean = targets.flatten(0, 1)[:8].mean(0)
    for row in (slice(0, 1), slice(1, 2)):
        output = mean.expand(1, 5, 3)
        scores.add(mean_squared_error(output, targets[row]), output, targets[row])
    found = scores.result()
    assert set(found) == {"loss", "nmse"} and found["nmse"] == pytest.approx(1.0, rel=1e-5)


def test_constant_targets_have_no_nmse() -> None:
    scores = Scores()
    scores.add(torch.ones(2), torch.zeros(2, 3), torch.full((2, 3), 0.1))
    assert scores.result() == {"loss": 1.0}


def test_outputs_of_ones_own_have_a_loss() -> None:
    scores = Scores()
    scores.add(torch.ones(2), ("whatever",), torch.zeros(2, 3))
    assert scores.result() == {"loss": 1.0}
