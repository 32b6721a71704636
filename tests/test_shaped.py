"""Directions in a basis and of sizes of their own: every rung sees what the gradient is made of."""

from __future__ import annotations

import pytest
import torch

from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.factors import LowRank
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.shaped import ShapedDirections, matrices
from tests.engine.models import CASES, built

KEY = Key.root(7)
ROW = torch.tensor([0, 0, 1, 2, 2, 3])
DIRECTION = torch.tensor([0, 1, 2, 3, 0, 4])
KINDS: list[tuple[str, int | None]] = [("rademacher", 1), ("gaussian", 2), ("rademacher", None)]


def shaped(
    params: dict[str, torch.Tensor], law: str, rank: int | None, width: int = 2
) -> ShapedDirections:
    """A basis for every matrix but one, a size for every third parameter."""
    generator = torch.Generator().manual_seed(5)
    bases = {
        name: torch.randn(n, width, generator=generator).to(params[name])
        for name, (_, n) in list(matrices(params).items())[1:]
    }
    sizes = {name: 0.5 + number for number, name in enumerate(list(params)[::3])}
    return ShapedDirections(KEY, params, 5, law, rank, bases=bases, sizes=sizes)


@pytest.mark.parametrize("name", list(CASES))
def test_every_rung_sees_the_dense_directions(name: str) -> None:
    case, model = CASES[name], built(name)
    batch = case.batch(4).to("cpu", torch.float64)
    scale = torch.linspace(-0.03, 0.03, len(ROW), dtype=torch.float64)
    for law, rank in KINDS:
        losses = []
        for rung in ("sequential", "fold", "copies"):
            engine = Engine(model, case.objective, rung=rung)
            try:
                with torch.inference_mode():
                    engine.choose(batch)
            except UsageError:
                # Not every model runs under vmap.
                assert rung == "copies"
                continue
            family = shaped(dict(engine.params), law, rank)
            with torch.inference_mode():
                losses.append(engine.losses(batch, ROW, family, DIRECTION, scale))
        for other in losses[1:]:
            torch.testing.assert_close(losses[0], other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("law", "rank"), KINDS)
def test_the_gradient_is_the_sum_of_what_is_measured(
    law: str, rank: int | None, dtype: torch.dtype
) -> None:
    params = {n: torch.zeros(s, dtype=dtype) for n, s in {"a": (3, 4), "w": (6, 5, 2)}.items()}
    params |= {"v": torch.zeros(7, dtype=dtype), "s": torch.zeros((), dtype=dtype)}
    family = shaped(params, law, rank)
    coefficients = torch.linspace(-1, 2, 5, dtype=torch.float64)
    gradient, ids = DirectionGradient(family, coefficients), torch.arange(5)
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    squares = torch.zeros(5, dtype=torch.float64)
    for name in params:
        factors = family.factors(name, ids)
        dense = factors.dense() if isinstance(factors, LowRank) else factors
        dense = dense.reshape(5, *params[name].shape)
        if not isinstance(factors, LowRank) or dtype != torch.bfloat16:
            torch.testing.assert_close(dense, family.dense(name, ids))
        expected = torch.einsum("i,i...->...", coefficients, dense.double())
        size = float(dense.double().abs().max())
        found = gradient[name].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=4 * close * size)
        squares += dense.double().reshape(5, -1).square().sum(1)
    torch.testing.assert_close(family.square_norms(ids), squares, rtol=10 * close, atol=0)
    torch.testing.assert_close(gradient.square_norms(), squares, rtol=10 * close, atol=0)


def test_without_a_basis_and_a_size_it_is_the_plain_family() -> None:
    params = {"w": torch.zeros(6, 5, dtype=torch.float64), "v": torch.zeros(3).double()}
    plain, ids = Directions(KEY, params, 4), torch.arange(4)
    for name in params:
        assert torch.equal(
            plain.dense(name, ids), ShapedDirections(KEY, params, 4).dense(name, ids)
        )


def test_rows_move_within_the_basis() -> None:
    """The covariance of a row is V V^T: signs along one column are that column, up to a sign."""
    params = {"w": torch.zeros(6, 5, dtype=torch.float64)}
    column = torch.tensor([[1.0], [2.0], [0.0], [0.0], [3.0]], dtype=torch.float64)
    family = ShapedDirections(KEY, params, 400, bases={"w": column})
    dense = family.dense("w", torch.arange(400))
    torch.testing.assert_close(dense.abs(), column.abs()[:, 0].expand(400, 6, 5))
    wide = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    family = ShapedDirections(KEY, params, 4000, bases={"w": wide})
    rows = family.dense("w", torch.arange(4000)).flatten(0, 1)
    torch.testing.assert_close(rows.T @ rows / len(rows), wide @ wide.T, rtol=0.1, atol=0.1)
