"""Constraint sets: every oracle, diameter, projection and membership against an independent one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import NonlinearConstraint, linprog, minimize
from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.optim.sets import (
    Box,
    ConstraintSet,
    Entries,
    KSparsePolytope,
    L1Ball,
    L2Ball,
    LInfBall,
    LpBall,
    NuclearBall,
    Outer,
    Product,
    Simplex,
    SpectralBall,
)
from fwdlearn.optim.sets.matrices import leading_pair

CLASSES: list[type[ConstraintSet]] = [
    L1Ball,
    L2Ball,
    LInfBall,
    LpBall,
    KSparsePolytope,
    NuclearBall,
    SpectralBall,
    Simplex,
    Box,
]
SETS = [example for each in CLASSES for example in each.examples()]
SHAPES = [(7,), (4, 3), (2, 3, 2), ()]

each_set = pytest.mark.parametrize("region", SETS, ids=repr)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def least(region: Any, direction: np.ndarray) -> float:
    """The least <x, direction> over the set, by linear programming, a solver or an SVD."""
    d = direction.ravel()
    n = len(d)
    if isinstance(region, Simplex):
        return float(linprog(d, A_eq=np.ones((1, n)), b_eq=[region.total]).fun)
    if isinstance(region, Box):
        return float(linprog(d, bounds=(region.low, region.high)).fun)
    if isinstance(region, L1Ball | LInfBall | KSparsePolytope):
        # x and its absolute value t: -t <= x <= t <= largest, sum t <= total.
        largest = region.radius
        count = {L1Ball: 1, LInfBall: n}.get(type(region)) or region.nonzeros
        eye = np.eye(n)
        above = np.vstack((np.hstack((eye, -eye)), np.hstack((-eye, -eye))))
        total = np.hstack((np.zeros(n), np.ones(n)))[None]
        found = linprog(
            np.hstack((d, np.zeros(n))),
            A_ub=np.vstack((above, total)),
            b_ub=np.hstack((np.zeros(2 * n), largest * count)),
            bounds=[(None, None)] * n + [(0, largest)] * n,
        )
        return float(found.fun)
    if isinstance(region, L2Ball | LpBall):
        p = 2.0 if isinstance(region, L2Ball) else region.p
        inside = NonlinearConstraint(lambda x: (np.abs(x) ** p).sum(), -np.inf, region.radius**p)
        start = -0.1 * region.radius * d / np.linalg.norm(d)
        found = minimize(
            lambda x: x @ d, start, jac=lambda x: d, constraints=inside, method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 500},
        )  # fmt: skip
        return float(found.fun)
    matrix = direction.reshape(len(direction) if direction.ndim else 1, -1)
    values = np.linalg.svd(matrix, compute_uv=False)
    return -region.radius * float(values.max() if isinstance(region, NuclearBall) else values.sum())


@each_shape
@each_set
def test_oracle_finds_the_least(region: Any, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        direction = normal(*shape, seed=seed)
        vertex = region.vertex(direction)
        value = float(vertex.dot(direction))
        assert value == pytest.approx(least(region, direction.numpy()), rel=1e-6)
        dense = vertex.dense(direction)
        assert float((dense * direction).sum()) == pytest.approx(value, rel=1e-12)
        assert region.excess(dense) <= 1e-12


@each_set
def test_no_point_of_the_set_beats_the_oracle(region: Any) -> None:
    direction = normal(4, 3, seed=1)
    value = float(region.vertex(direction).dot(direction))
    for seed in range(100):
        inside = region.project(normal(4, 3, seed=seed) * 10 ** (seed % 4 - 1))
        assert region.contains(inside, 1e-9)
        assert float((inside * direction).sum()) >= value - 1e-9 * abs(value)


@each_shape
@each_set
def test_no_two_points_are_further_apart_than_the_diameter(
    region: Any, shape: tuple[int, ...]
) -> None:
    size = torch.Size(shape)
    directions = [normal(*shape, seed=seed) for seed in range(50)]
    # Between these lie the longest lines of the p-norms.
    directions += [torch.ones(shape, dtype=torch.float64), torch.zeros(shape).double()]
    directions[-1].view(-1)[0] = 1
    ends = [(region.vertex(d).dense(d), region.vertex(-d).dense(d)) for d in directions]
    longest = max(float((a - b).norm()) for a, b in ends)
    diameter = region.diameter(size)
    assert longest == pytest.approx(diameter, rel=1e-9, abs=1e-12)
    points = [point for pair in ends for point in pair]
    assert max(float((a - b).norm()) for a in points for b in points) <= diameter + 1e-9


@each_shape
@each_set
def test_projection_is_the_nearest_point(region: Any, shape: tuple[int, ...]) -> None:
    for seed, scale in enumerate((0.01, 1.0, 100.0)):
        point = normal(*shape, seed=seed) * scale
        nearest = region.project(point)
        assert nearest is not point and nearest.shape == point.shape
        assert region.excess(nearest) <= 1e-12
        assert torch.allclose(region.project(nearest), nearest, rtol=1e-12, atol=1e-12)
        if not isinstance(region, LpBall):
            # Nearest means that no point of the set lies further towards `point` than it does.
            away = point - nearest
            best = -float(region.vertex(-away).dot(-away))
            assert best <= float((away * nearest).sum()) + 1e-9 * max(1, abs(best))
        distance = float((point - nearest).norm())
        assert region.distance(point) == pytest.approx(distance, rel=1e-9, abs=1e-12)
        assert region.contains(point, 0.0) == (distance <= 1e-12)


@each_set
def test_membership_has_a_tolerance(region: Any) -> None:
    inside = region.project(normal(4, 3) * 100)
    assert region.contains(inside)
    assert not region.contains(inside * 1.1 if not isinstance(region, Box) else inside * 4)
    outside = inside * (1 + 1e-4)
    assert 0 < region.excess(outside) < 1e-3
    assert not region.contains(outside)
    assert region.contains(outside, tolerance=1e-3)
    assert region.distance(outside) > 0
    assert region.distance(inside) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_set
def test_rounding_is_put_right(region: Any, dtype: torch.dtype) -> None:
    point = region.project(normal(4, 3, dtype=dtype) * 100) * (1 + 1e-5)
    before = point.clone()
    bound = region.settle(point)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert region.excess(point) <= tolerance
    assert region.excess(point) <= bound + tolerance
    assert float((point - before).norm()) <= 1e-4 * float(before.norm())


@each_set
def test_rounding_of_a_step_is_bounded(region: Any) -> None:
    """The bound that spares the check: no step from the boundary to a vertex exceeds it."""
    for seed in range(200):
        start = normal(6, 5, seed=seed, dtype=torch.float32)
        point = region.vertex(start).dense(start)
        before = region.excess(point)
        direction = normal(6, 5, seed=1000 + seed, dtype=torch.float32)
        region.vertex(direction).pull(point, 0.3)
        assert region.excess(point) <= max(0.0, 0.7 * before) + region.rounding(point)


@each_set
def test_a_direction_of_zeros_has_a_vertex_too(region: Any) -> None:
    vertex = region.vertex(torch.zeros(4, 3))
    assert region.contains(vertex.dense(torch.zeros(4, 3)))
    assert float(vertex.dot(torch.zeros(4, 3))) == 0


@each_set
def test_directions_of_any_size_give_the_same_vertex(region: Any) -> None:
    direction = normal(4, 3, dtype=torch.float32)
    usual = region.vertex(direction).dense(direction)
    for scale in (2.0**-80, 2.0**80):
        assert torch.allclose(region.vertex(direction * scale).dense(direction), usual, atol=1e-4)


def test_updates_are_as_thin_as_the_set_allows() -> None:
    direction = normal(6, 4)
    one = L1Ball(2.0).vertex(direction)
    assert isinstance(one, Entries) and len(one.index) == 1
    few = KSparsePolytope(2.0, 3).vertex(direction)
    assert isinstance(few, Entries) and len(few.index) == 3
    thin = NuclearBall(2.0).vertex(direction)
    assert isinstance(thin, Outer)
    assert int(torch.linalg.matrix_rank(thin.dense(direction))) == 1


def test_k_sparse_is_between_its_limits() -> None:
    direction = normal(9)
    for nonzeros, limit in ((1, L1Ball(2.0)), (9, LInfBall(2.0)), (50, LInfBall(2.0))):
        region = KSparsePolytope(2.0, nonzeros)
        ours, theirs = (s.vertex(direction).dense(direction) for s in (region, limit))
        assert torch.equal(ours, theirs)
        assert region.diameter(torch.Size((9,))) == pytest.approx(limit.diameter(torch.Size((9,))))


def test_the_krylov_oracle_is_a_function_and_close() -> None:
    noise = normal(300, 200)
    left, right = leading_pair(noise, 32)
    again = leading_pair(noise, 32)
    assert torch.equal(left, again[0]) and torch.equal(right, again[1])
    assert float(left.norm()) == pytest.approx(1) == float(right.norm())
    top = float(torch.linalg.svdvals(noise)[0])
    assert 0.9999 * top < float(left @ noise @ right) <= top * (1 + 1e-12)
    # One direction that stands out is found to rounding.
    clear = noise + 60 * torch.outer(_unit(normal(300, seed=1)), _unit(normal(200, seed=2)))
    left, right = leading_pair(clear, 32)
    assert float(left @ clear @ right) == pytest.approx(float(torch.linalg.svdvals(clear)[0]))
    # So is the top of a matrix in blocks, and a space that is exhausted early is no harm.
    blocks = torch.block_diag(torch.full((2, 2), 3.0), torch.eye(5)).double()
    left, right = leading_pair(blocks, 32)
    assert float(left @ blocks @ right) == pytest.approx(6)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def test_product() -> None:
    (region,) = Product.examples()
    shapes = [(4,), (3, 2)]
    directions = [normal(*shape) for shape in shapes]
    for vertex, one, direction in zip(
        region.vertices(directions), region.sets, directions, strict=True
    ):
        assert torch.equal(vertex.dense(direction), one.vertex(direction).dense(direction))
    sizes = [torch.Size(shape) for shape in shapes]
    assert region.diameter(sizes) == pytest.approx(math.hypot(4.0, 1.0))
    points = [10 * direction for direction in directions]
    assert not region.contains(points)
    inside = region.project(points)
    assert region.contains(inside) and region.distance(inside) <= 1e-12
    apart = math.hypot(*(float((a - b).norm()) for a, b in zip(points, inside, strict=True)))
    assert region.distance(points) == pytest.approx(apart)


class Coupled(L2Ball):
    couples = True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1Ball(0), "L1Ball(radius=...) must be positive, got 0."),
        (lambda: L2Ball(math.inf), "L2Ball(radius=...) must be positive, got inf."),
        (lambda: NuclearBall(math.nan), "NuclearBall(radius=...) must be positive, got nan."),
        (
            lambda: NuclearBall(1.0, 0),
            "NuclearBall(iterations=...) must be at least 1, got 0.",
        ),
        (
            lambda: LpBall(1.0, 1.0),
            "LpBall(p=...) must be more than 1 and finite, got 1.0; the limits are L1Ball and "
            "LInfBall.",
        ),
        (
            lambda: KSparsePolytope(1.0, 0),
            "KSparsePolytope(nonzeros=...) must be at least 1, got 0.",
        ),
        (lambda: Simplex(-1.0), "Simplex(total=...) must be positive, got -1.0."),
        (
            lambda: Box(1.0, 1.0),
            "Box(low=...) must be less than high, both finite, got 1.0 and 1.0.",
        ),
        (
            lambda: Product((Coupled(1.0),)),
            "Product(sets=...) holds Coupled, which couples tensors, so its oracle does not "
            "separate; use sets of single tensors.",
        ),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
    assert isinstance(caught.value, UsageError) == message.startswith("Product")
