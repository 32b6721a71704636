"""Directions have identity covariance, and depend on their name alone; gradients are sums."""

from __future__ import annotations

import math
import re

import pytest
import torch
from scipy import stats
from torch import Tensor

import fwdlearn.directions
from fwdlearn.directions import Directions, scales_of
from fwdlearn.errors import UsageError
from fwdlearn.factors import LowRank
from fwdlearn.gradient import DirectionGradient, summable, thirds
from fwdlearn.keys import Key

FALSE_ALARM = 1e-6
KINDS = [("rademacher", 1), ("rademacher", 2), ("rademacher", None)]
KINDS += [("gaussian", 1), ("gaussian", 3), ("gaussian", None)]
kinds = pytest.mark.parametrize(("law", "rank"), KINDS)


def params(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"w": (5, 3), "conv": (2, 3, 2, 2), "bias": (4,), "row": (1, 6), "gain": ()}
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


def dense(family: Directions, ids: Tensor) -> Tensor:
    """[n, d]."""
    return torch.cat([family.dense(name, ids).reshape(len(ids), -1) for name in family.params], 1)


@kinds
def test_covariance_is_the_identity(law: str, rank: int | None) -> None:
    """z-tests of all means and all products, corrected for their number."""
    shapes = {"w": (3, 2), "twin": (3, 2), "bias": (2,)}
    point = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    z = dense(Directions(Key.root(1), point, 6000, law, rank), torch.arange(6000))
    i, j = torch.triu_indices(z.shape[1], z.shape[1])
    products = z[:, i] * z[:, j]
    limit = stats.norm.isf(FALSE_ALARM / 2 / (z.shape[1] + len(i)))
    for sample, expected in ((z, torch.zeros(z.shape[1])), (products, (i == j).double())):
        # A product that never varies has to be exact.
        error = (sample.var(0) / len(z)).sqrt() + 1e-12
        assert float(((sample.mean(0) - expected).abs() / error).max()) < limit


@kinds
def test_every_matrix_has_its_rank(law: str, rank: int | None) -> None:
    family = Directions(Key.root(2), params(), 4, law, rank)
    ids = torch.arange(4)
    for name, m, n in (("w", 5, 3), ("conv", 2, 12)):
        factors = family.factors(name, ids)
        assert isinstance(factors, LowRank) == (rank is not None)
        full = family.dense(name, ids).reshape(4, m, n)
        if rank is not None:
            assert int(torch.linalg.matrix_rank(full).max()) <= rank
    for name in ("bias", "row", "gain"):
        # Vectors, and matrices with a side of one, have entries of their own.
        factors = family.factors(name, ids)
        assert isinstance(factors, Tensor) and factors.shape == (4, *params()[name].shape)


@kinds
def test_norms(law: str, rank: int | None) -> None:
    family = Directions(Key.root(3), params(), 8, law, rank)
    ids = torch.tensor([5, 0, 7])
    exact = dense(family, ids).square().sum(1)
    torch.testing.assert_close(family.square_norms(ids), exact)
    if law == "rademacher" and rank in (1, None):
        assert exact.tolist() == [15 + 24 + 4 + 6 + 1] * 3


@kinds
def test_order_of_parameters_does_not_matter(law: str, rank: int | None) -> None:
    point, ids = params(), torch.arange(3)
    one = Directions(Key.root(4), point, 3, law, rank)
    other = Directions(Key.root(4), dict(reversed(point.items())), 3, law, rank)
    alone = Directions(Key.root(4), {"conv": point["conv"]}, 3, law, rank)
    for name in point:
        assert torch.equal(one.dense(name, ids), other.dense(name, ids))
    assert torch.equal(one.dense("conv", ids), alone.dense("conv", ids))


def test_names_make_the_difference_and_a_tied_name_makes_none() -> None:
    tied = torch.zeros(4, 3)
    ids = torch.arange(3)
    both = Directions(Key.root(5), {"embed": tied, "other": tied}, 3)
    assert not torch.equal(both.dense("embed", ids), both.dense("other", ids))
    alone = Directions(Key.root(5), {"embed": tied}, 3)
    assert torch.equal(both.dense("embed", ids), alone.dense("embed", ids))


@kinds
def test_numbers_do_not_depend_on_count_chunks_or_memory(
    law: str, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    point, ids = params(), torch.tensor([6, 1, 1, 4])
    whole = Directions(Key.root(6), point, 7, law, rank)
    kept = dense(whole, ids)
    assert torch.equal(dense(Directions(Key.root(6), point, 700, law, rank), ids), kept)
    assert torch.equal(torch.cat([dense(whole, one) for one in ids.split(1)]), kept)
    coefficients = torch.linspace(-1, 1, 7, dtype=torch.float64)
    gradient = DirectionGradient(whole, coefficients)
    norms = whole.square_norms(ids)

    monkeypatch.setattr(fwdlearn.directions, "_KEEP_BYTES", 0)
    monkeypatch.setattr(fwdlearn.directions, "_EXPAND_BYTES", 64)
    again = Directions(Key.root(6), point, 7, law, rank)
    assert len(list(again.chunks("w", 7))) > 1
    assert torch.equal(dense(again, ids), kept)
    torch.testing.assert_close(again.square_norms(ids), norms)
    for name, value in DirectionGradient(again, coefficients).items():
        torch.testing.assert_close(value, gradient[name], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, None])
def test_rademacher_is_exact_in_every_dtype(dtype: torch.dtype, rank: int | None) -> None:
    """Signs are whole numbers: whatever the dtype, they are those of int8."""
    ids = torch.arange(5)
    reference = Directions(Key.root(7), params(), 5, "rademacher", rank)
    family = Directions(Key.root(7), params(dtype), 5, "rademacher", rank)
    for name in params():
        signs = reference.dense(name, ids).to(torch.int8)
        assert set(signs.unique().tolist()) <= {-1, 1}
        assert family.dense(name, ids).dtype == dtype
        assert torch.equal(family.dense(name, ids).to(torch.int8), signs)
        assert torch.equal(family.dense(name, ids).double(), signs.double())


def test_gaussian_moments() -> None:
    """Kolmogorov-Smirnov, and the fourth moment, of 40,000 numbers."""
    point = {"v": torch.zeros(100, dtype=torch.float64)}
    z = dense(Directions(Key.root(8), point, 400, "gaussian"), torch.arange(400)).flatten()
    assert stats.kstest(z.numpy(), "norm").pvalue > FALSE_ALARM
    limit = stats.norm.isf(FALSE_ALARM / 2)
    assert abs(float((z**4).mean()) - 3) < limit * math.sqrt(96 / len(z))
    assert z.isfinite().all()


def test_expanded_numbers_can_be_used_outside_inference_mode() -> None:
    family = Directions(Key.root(9), params(), 2)
    with torch.inference_mode():
        family.dense("w", torch.tensor([0]))
    family.dense("w", torch.tensor([0])).mul_(2)


@kinds
def test_gradient_is_the_sum(law: str, rank: int | None) -> None:
    family = Directions(Key.root(10), params(), 9, law, rank)
    coefficients = torch.linspace(-2, 3, 9, dtype=torch.float64)
    gradient = DirectionGradient(family, coefficients)
    assert list(gradient) == list(params()) and len(gradient) == 5
    for name in gradient:
        written = family.dense(name, torch.arange(9))
        explicit = sum(c * e for c, e in zip(coefficients, written, strict=True))
        torch.testing.assert_close(gradient[name], explicit, rtol=1e-13, atol=1e-13)


def test_gradient_sums_in_float32_for_short_dtypes() -> None:
    coefficients = torch.full((300,), 1 / 300, dtype=torch.float64)
    exact = DirectionGradient(Directions(Key.root(11), params(), 300), coefficients)
    for dtype in (torch.bfloat16, torch.float32):
        short = DirectionGradient(Directions(Key.root(11), params(dtype), 300), coefficients)
        for name in short:
            assert short[name].dtype == torch.float32
            torch.testing.assert_close(short[name].double(), exact[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, None])
def test_sums_of_signs_are_exact_in_any_order(
    dtype: torch.dtype, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Some hundred times as large as others.
    coefficients = torch.randn(600, dtype=torch.float64, generator=generator).pow(3)
    sizes, wide = {"w": 0.3, "bias": 0.7}, torch.promote_types(dtype, torch.float32)

    def made() -> dict[str, Tensor]:
        family = Directions(Key.root(15), params(dtype), 600, "rademacher", rank, sizes)
        return dict(DirectionGradient(family, coefficients))

    at_once = made()
    for size in (64, 1000, 10_000):
        monkeypatch.setattr(fwdlearn.directions, "_EXPAND_BYTES", size)
        for name, value in made().items():
            assert torch.equal(value, at_once[name]), (name, size)
    family = Directions(Key.root(15), params(dtype), 600, "rademacher", rank)
    rounded = summable(coefficients.to(wide), rank or 1).double()
    tail = 2.0**-24 if wide == torch.float32 else 2.0**-53
    most = coefficients.abs().sum() * (rank or 1)
    assert (rounded - coefficients.to(wide)).abs().max() <= tail * most
    for name, site in family.sites.items():
        numbers = family.dense(name, torch.arange(600)).double().reshape(600, -1)
        if site.rank == 2:
            numbers = (numbers * 2**0.5).round()
        exact = (rounded @ numbers).view(site.shape)
        if name not in sizes and site.rank != 2:
            assert torch.equal(at_once[name].double(), exact), name


def test_what_cannot_be_added_up_stays() -> None:
    for values in ([], [0.0, 0.0], [math.inf, 1.0], [math.nan]):
        tensor = torch.tensor(values)
        assert torch.equal(summable(tensor).nan_to_num(7.0), tensor.nan_to_num(7.0))
    assert summable(torch.tensor([1e-44, 3.0])).tolist() == [0.0, 3.0]


def test_gradient_needs_a_coefficient_for_each_direction() -> None:
    message = "one coefficient for each of 4 directions, got shape (3,)."
    with pytest.raises(ValueError, match=re.escape(message)):
        DirectionGradient(Directions(Key.root(0), params(), 4), torch.zeros(3))


@kinds
def test_sizes_scale_directions_and_leave_gradients_gradients(law: str, rank: int | None) -> None:
    point, ids = params(), torch.arange(6)
    size = {"w": 0.25, "bias": 4.0}
    plain = Directions(Key.root(12), point, 6, law, rank)
    sized = Directions(Key.root(12), point, 6, law, rank, size)
    coefficients = torch.linspace(-2, 3, 6, dtype=torch.float64)
    gradient, norms = DirectionGradient(sized, coefficients), torch.zeros(6, dtype=torch.float64)
    for name in point:
        scale = size.get(name, 1.0)
        torch.testing.assert_close(sized.dense(name, ids), scale * plain.dense(name, ids))
        # A slope along a direction of size s is s times as large, and so is the direction.
        explicit = torch.tensordot(coefficients, sized.dense(name, ids), 1) / scale**2
        torch.testing.assert_close(gradient[name], explicit)
        norms += (sized.dense(name, ids) / scale**2).reshape(6, -1).square().sum(1)
    torch.testing.assert_close(sized.square_norms(ids), dense(sized, ids).square().sum(1))
    torch.testing.assert_close(gradient.square_norms(), norms)


def test_the_first_pattern_that_matches_gives_the_size() -> None:
    names = ["head.bias", "head.weight", "body.bias"]
    found = scales_of("X", {"head.bias": 0.1, "*bias": 0.2, "head.*": 0.3}, names)
    assert found == {"head.bias": 0.1, "body.bias": 0.2, "head.weight": 0.3}
    assert scales_of("X", None, names) == {}
    message = (
        "X(scales=...): the pattern 'tail*' matches no parameter; the first are head.bias, "
        "head.weight, body.bias."
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        scales_of("X", {"tail*": 0.1}, names)


@pytest.mark.parametrize(
    ("law", "rank", "message"),
    [
        ("cauchy", 1, "Directions(law=...) must be one of rademacher, gaussian, got 'cauchy'."),
        ("gaussian", 0, "must be a positive integer, or None for independent entries, got 0."),
        ("gaussian", True, "Directions(rank=...) must be a positive integer, or None"),
        ("gaussian", 1.5, "got 1.5."),
    ],
)
def test_refusals(law: str, rank: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Directions(Key.root(0), params(), 1, law, rank)


def test_three_short_parts_are_the_number() -> None:
    value = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    parts = thirds(value).double().view(50, 3, 7)
    assert torch.equal(parts.sum(1), value.double())
