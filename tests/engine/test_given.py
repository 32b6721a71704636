"""Directions that are given whole move a model on every rung as drawn ones do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import RUNGS, Engine
from fwdlearn.engine.params import trainable
from fwdlearn.engine.slopes import SLOPE_RUNGS, Slopes
from fwdlearn.errors import UsageError
from fwdlearn.given import GivenDirections
from fwdlearn.gradient import DirectionGradient, Summed
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy
from fwdlearn.products import along, gram

KINDS = [("rademacher", 1), ("gaussian", 3), ("rademacher", None)]


class Net(nn.Module):
    """An embedding, a convolution, a normalisation, a scalar and a product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv(self.table(x).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.norm(inner) * self.gain).mean(1))


def setting() -> tuple[Net, Batch, dict[str, Tensor]]:
    model = Net().double()
    key = Key.root(3)
    tokens = (key.uniform(20, "tokens") * 7).long().view(4, 5)
    params = {name: value.detach() for name, value in trainable(model).items()}
    return model, Batch((tokens,), torch.tensor([0, 1, 2, 0])), params


def written_out(family: Directions) -> GivenDirections:
    ids = torch.arange(family.count)
    return GivenDirections(family.params, {n: family.dense(n, ids) for n in family.params})


@pytest.mark.parametrize("rung", RUNGS)
@torch.inference_mode()
def test_losses_of_drawn_directions_written_out(rung: str) -> None:
    model, batch, params = setting()
    drawn = Directions(Key.root(1), params, 3)
    row, direction = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([0, 2, 2, 1, 0])
    scale = torch.tensor([0.1, -0.2, 0.3, 0.1, 0.0])
    engine = Engine(model, cross_entropy, rung)
    expected = engine.losses(batch, row, drawn, direction, scale)
    found = engine.losses(batch, row, written_out(drawn), direction, scale)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rung", SLOPE_RUNGS)
@pytest.mark.parametrize("shared", [True, False])
@torch.inference_mode()
def test_slopes_of_drawn_directions_written_out(rung: str, shared: bool) -> None:
    model, batch, params = setting()
    drawn = Directions(Key.root(1), params, 3)
    row = torch.arange(4).repeat_interleave(2)
    direction = torch.arange(2).repeat(4) if shared else torch.arange(8) % 3
    slopes = Slopes(
        model, trainable(model), lambda out, rows: cross_entropy(out, rows.targets), rung
    )
    expected = slopes(batch, row, drawn, direction)
    found = slopes(batch, row, written_out(drawn), direction)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("law", "rank"), KINDS)
def test_inner_products_and_sums(law: str, rank: int | None) -> None:
    _, _, params = setting()
    drawn = Directions(Key.root(1), params, 6, law, rank)
    given = written_out(drawn)
    ids = torch.tensor([[0, 1, 2], [5, 3, 0]])
    flat = torch.cat([value.reshape(6, -1) for value in given.values.values()], 1)
    inner = flat @ flat.T
    for family in (drawn, given):
        torch.testing.assert_close(gram(family, ids), inner[ids[:, :, None], ids[:, None]])
        torch.testing.assert_close(along(family, given), inner[0])
        norms = family.square_norms(torch.arange(6))
        torch.testing.assert_close(norms, inner.diagonal())
        coefficients = torch.arange(6.0).double()
        one = DirectionGradient(family, coefficients)
        both = Summed(one, one)
        for name, value in given.values.items():
            expected = torch.einsum("k,k...->...", coefficients, value)
            torch.testing.assert_close(one[name], expected)
            torch.testing.assert_close(both[name], 2 * expected)
            # Nothing is added up in place.
            torch.testing.assert_close(both[name], 2 * expected)
        assert list(both) == list(one) and len(both) == len(one)


def test_what_is_applied_is_what_the_parameters_can_hold() -> None:
    params = {"w": torch.zeros(3, 2, dtype=torch.bfloat16), "gain": torch.zeros(())}
    given = GivenDirections(params, {"w": torch.full((2, 3, 2), 1.001)})
    assert given.count == 2
    assert given.dense("w", torch.tensor([1])).dtype == torch.bfloat16
    assert given.square_norms(torch.arange(2)).tolist() == [6.0, 6.0]
    assert given.dense("gain", torch.tensor([0, 1])).tolist() == [0.0, 0.0]
    with pytest.raises(TypeError, match="no factors to pick from"):
        given.at(torch.tensor([0])).picked("w", torch.tensor([[0]]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "must name a parameter at least"),
        ({"v": torch.ones(1, 2)}, "names 'v', which is no trainable parameter; the first of them "),
        (
            {"w": torch.ones(1, 3, 2), "b": torch.ones(2, 3)},
            "must have shape (1, 3) for 'b', one direction after the other, got (2, 3).",
        ),
    ],
)
def test_values_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    params = {"w": torch.zeros(3, 2), "b": torch.zeros(3)}
    with pytest.raises(UsageError, match=re.escape(message)):
        GivenDirections(params, values)
