"""Directions of a row are orthogonal, those of different rows independent."""

from __future__ import annotations

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.keys import Key
from fwdlearn.noise import Output
from fwdlearn.orthogonal import orthogonal_noise

KEY = Key.root(3)


def drawn(plan: Plan, *shapes: tuple[int, ...], key: Key = KEY) -> Tensor:
    """[directions, noisy numbers]."""
    sites = {f"layer{n}": Output(shape, torch.float32, ()) for n, shape in enumerate(shapes)}
    noise = orthogonal_noise(key, sites, plan, None, list(sites))
    assert noise.count == plan.directions
    return torch.cat([noise.values[name].flatten(1) for name in sites], 1)


def test_directions_of_a_row_are_orthogonal() -> None:
    """Numbers of a row a power of two: inner products zero, with unequal counts and two layers."""
    plan = Plan(torch.tensor([5, 16, 1, 8]))
    points = drawn(plan, (3, 4), (4,))
    assert set(points.flatten().tolist()) == {-1.0, 1.0}
    for row in range(plan.rows):
        own = points[plan.direction[plan.row == row]]
        torch.testing.assert_close(own @ own.T, 16 * torch.eye(len(own)))


def test_a_full_set_tells_every_number() -> None:
    """The mean of z z^T is the identity where numbers are no power of two either."""
    plan = Plan.uniform(3, 32)
    points = drawn(plan, (19,))
    for row in range(3):
        own = points[plan.direction[plan.row == row]]
        torch.testing.assert_close(own.T @ own / 32, torch.eye(19))


def test_more_directions_than_numbers_begin_anew() -> None:
    """Each turn is a full set, with signs of its own."""
    one, other = drawn(Plan.uniform(1, 16), (8,)).split(8)
    for own in (one, other):
        torch.testing.assert_close(own.T @ own / 8, torch.eye(8))
    assert not torch.equal(one, other)


def test_rows_share_directions_where_the_plan_says_so() -> None:
    plan = Plan.uniform(6, 4, sharing=3)
    points = drawn(plan, (8,))
    assert len(points) == 8
    for own in points.split(4):
        torch.testing.assert_close(own @ own.T, 8 * torch.eye(4))


def test_rows_and_keys_are_independent() -> None:
    """The first direction of 4,096 rows: means and products of numbers within five standard
    errors, of 36 figures: a false alarm in 50,000."""
    points = drawn(Plan.uniform(4096, 2), (8,))[::2]
    within = points.T @ points / 4096 - torch.eye(8)
    assert points.mean(0).abs().max() < 5 / 64
    assert within.abs().max() < 5 / 64
    assert not torch.equal(points, drawn(Plan.uniform(4096, 2), (8,), key=Key.root(4))[::2])


def test_a_row_has_the_same_signs_in_any_company() -> None:
    alone, among = drawn(Plan.uniform(1, 4), (8,)), drawn(Plan.uniform(5, 4), (8,))
    assert torch.equal(alone, among[:4])


def test_overlap_is_what_is_left_of_the_variance() -> None:
    """Mean squared correlation of two numbers over some directions, times how many there are.

    Over 28 pairs of 512 rows; the standard error of the figure is below 0.02.
    """
    sites = {"layer": Output((8,), torch.float32, ())}
    for count in (1, 2, 3, 4, 6, 8, 11, 16):
        plan = Plan.uniform(512, count)
        noise = orthogonal_noise(KEY, sites, plan, None, ["layer"])
        points = noise.values["layer"].view(512, count, 8)
        squares = (points.mT @ points / count).square()
        off = (squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)) / 56
        found = float(noise.overlap(torch.tensor([float(count)])))
        assert abs(float(off.mean()) * count - found) < 0.1
