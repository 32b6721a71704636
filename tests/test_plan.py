"""Who gets which directions, with which weight."""

from __future__ import annotations

import re

import pytest
import torch

from fwdlearn.allocator import Plan
from fwdlearn.errors import NonFiniteError


def test_unequal_counts_private() -> None:
    plan = Plan(torch.tensor([2, 1, 3]))
    assert (plan.rows, len(plan), plan.directions) == (3, 6, 6)
    assert plan.row.tolist() == [0, 0, 1, 2, 2, 2]
    assert plan.direction.tolist() == [0, 1, 2, 3, 4, 5]
    weights = [1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9]
    assert plan.weight.tolist() == pytest.approx(weights, abs=1e-15)
    assert plan.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("sharing", "direction", "directions"),
    [
        (2, [0, 1, 0, 2, 3, 4, 2], 5),
        (3, [0, 1, 0, 0, 1, 2, 3], 4),
        (4, [0, 1, 0, 0, 1, 2, 0], 3),
        (99, [0, 1, 0, 0, 1, 2, 0], 3),
    ],
)
def test_unequal_counts_shared(sharing: int, direction: list[int], directions: int) -> None:
    plan = Plan(torch.tensor([2, 1, 3, 1]), sharing)
    assert plan.row.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert plan.direction.tolist() == direction
    assert plan.directions == directions
    # Sharing changes who meets whom, never the weights.
    assert torch.equal(plan.weight, Plan(plan.counts).weight)


def test_uniform() -> None:
    plan = Plan.uniform(3, 4)
    assert plan.counts.tolist() == [4, 4, 4] and plan.directions == 12
    assert plan.weight.tolist() == pytest.approx([1 / 12] * 12)
    assert Plan.uniform(3, 4, sharing=3).directions == 4


def test_weights_sum_to_one_for_every_row_alike() -> None:
    counts = torch.arange(1, 40)
    plan = Plan(counts, 7)
    per_row = torch.zeros(39, dtype=torch.float64).index_add_(0, plan.row, plan.weight)
    torch.testing.assert_close(per_row, torch.full((39,), 1 / 39, dtype=torch.float64))
    for sharing in (1, 2, 7, 39):
        numbers = Plan(counts, sharing).direction
        assert numbers.unique().tolist() == list(range(int(numbers.max()) + 1))


def test_finite_gives_the_rest_of_a_row_its_weight() -> None:
    plan = Plan(torch.tensor([2, 1, 3]))
    weight, dropped = plan.finite(torch.ones(6, dtype=torch.bool))
    assert dropped == 0 and torch.equal(weight, plan.weight)
    weight, dropped = plan.finite(torch.tensor([True, True, True, False, True, True]))
    assert dropped == 1
    assert weight.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3, 0, 1 / 6, 1 / 6])
    # A row that has nothing left leaves the mean to the other rows.
    weight, dropped = plan.finite(torch.tensor([True, True, False, True, True, True]))
    assert dropped == 1
    assert weight.tolist() == pytest.approx([1 / 4, 1 / 4, 0, 1 / 6, 1 / 6, 1 / 6])


def test_finite_drops_what_is_too_little() -> None:
    plan = Plan(torch.tensor([2, 4]))
    valid = torch.tensor([True, False, True, True, True, True])
    weight, dropped = plan.finite(valid, least=2)
    assert dropped == 1
    assert weight.tolist() == pytest.approx([0, 0, 1 / 4, 1 / 4, 1 / 4, 1 / 4])


def test_finite_refuses_a_minority() -> None:
    plan = Plan.uniform(2, 2)
    half = torch.tensor([True, False, True, False])
    assert plan.finite(half)[0].tolist() == [0.5, 0, 0.5, 0]
    message = (
        "3 of 4 queries gave a loss that is not finite; lower the learning rate or sigma, or look "
        "for rows that overflow."
    )
    with pytest.raises(NonFiniteError, match=re.escape(message)):
        plan.finite(torch.tensor([True, False, False, False]))


@pytest.mark.parametrize(
    ("counts", "sharing", "message"),
    [
        (torch.tensor([1.0]), 1, "must be int64 [rows] with at least one row, got torch.float32"),
        (torch.tensor([[1]]), 1, "got torch.int64 (1, 1)."),
        (torch.tensor([], dtype=torch.int64), 1, "got torch.int64 (0,)."),
        (torch.tensor([2, 0]), 1, "Plan(counts) must be at least 1, got 0; Plan.included"),
        (torch.tensor([2]), 0, "Plan(sharing) must be at least 1, got 0."),
    ],
)
def test_refusals(counts: torch.Tensor, sharing: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan(counts, sharing)


def test_to_keeps_the_numbers() -> None:
    plan = Plan(torch.tensor([2, 1, 3]), 2)
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert moved.row.device.type == moved.weight.device.type == "meta"
    assert moved.directions == plan.directions


def test_rows_that_were_drawn_make_up_for_the_others() -> None:
    probability = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    plan = Plan.included(torch.tensor([2, 1, 0]), probability)
    assert plan.row.tolist() == [0, 0, 1] and plan.direction.tolist() == [0, 1, 2]
    assert plan.weight.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert plan.fewest == 1
    moved = plan.to("meta")
    assert moved.weight.device.type == "meta"
    # What is not finite leaves the sum to the rest, each row with its own weight.
    weight, dropped = plan.finite(torch.tensor([True, False, True]))
    assert dropped == 1 and weight.tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    weight, _ = Plan.included(torch.tensor([2, 2, 0]), probability).finite(
        torch.tensor([False, True, True, True]), least=2
    )
    assert weight.tolist() == pytest.approx([0, 0, 1 / 2, 1 / 2])


def test_pooled_queries_weigh_alike() -> None:
    plan = Plan.pooled(torch.tensor([1, 3]))
    assert plan.weight.tolist() == [0.25] * 4
    assert plan.row_weight is not None and plan.row_weight.tolist() == [0.25, 0.75]


def test_row_weights_are_refused() -> None:
    counts = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="positive where there are directions, and 0 where"):
        Plan(counts, row_weight=torch.tensor([0.5, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match=re.escape("must be float64 [2], got torch.float32 (2,)")):
        Plan(counts, row_weight=torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="must give some row a direction"):
        Plan.included(torch.tensor([0, 0]), torch.ones(2))
    with pytest.raises(ValueError, match=re.escape("must lie in (0, 1]")):
        Plan.included(counts, torch.tensor([1.0, 0.0]))
