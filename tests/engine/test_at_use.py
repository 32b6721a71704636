"""Large parameters are perturbed where they are used: the same losses, without a copy of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn import arithmetic
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import sequential
from fwdlearn.engine.at_use import AtUse
from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.engine.queries import Queries
from fwdlearn.gradient import DirectionGradient, update_of
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy


class Tied(nn.Module):
    """Uses one table twice, transposed in between, and reads sizes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * self.table.weight.shape[1] ** 0.5
        x = self.norm(x + self.heads(x, x, x, need_weights=False)[0])
        return (x @ self.table.weight.T).mean(1)


class Hidden(nn.Module):
    """Uses a parameter where no torch function shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused = nn.Linear(3, 4), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return F.linear(x, self.first.weight) + self.first.bias


def parts(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Queries]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().to(dtype).eval()
        x = torch.randint(12, (4, 5)) if kind is Tied else torch.randn(4, 3, dtype=dtype)
    batch = Batch((x,), torch.arange(4) % 3)
    family = Directions(Key.root(0), dict(model.named_parameters()), 2)
    row = torch.arange(4).repeat(2)
    scale = torch.full((8,), 0.01, dtype=torch.float64)
    return model, Queries(batch, row, family, torch.arange(8) % 2, scale)


def losses(model: nn.Module, queries: Queries) -> Tensor:
    def rows(output: object, batch: Batch) -> Tensor:
        return cross_entropy(output, batch.targets)

    with torch.no_grad():
        params = dict(model.named_parameters())
        return sequential.run(model, params, queries, rows, block=3)


@pytest.mark.parametrize("kind", [Tied, Hidden])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("copied", [0, 200])
def test_losses_are_those_of_a_whole_copy(
    kind: type[nn.Module], dtype: torch.dtype, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, queries = parts(kind, dtype)
    whole = losses(model, queries)
    monkeypatch.setattr(sequential, "_COPIED_BYTES", copied)
    assert torch.equal(losses(model, queries), whole)


@torch.no_grad()
def test_in_pieces_a_parameter_is_perturbed_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, queries = parts(Tied, torch.bfloat16)
    params = dict(model.named_parameters())
    whole = sequential.perturbed_copy(params, queries.directions, 1, 0.01)
    monkeypatch.setattr(sequential, "_AT_ONCE", 20)
    pieces = sequential.perturbed_copy(params, queries.directions, 1, 0.01)
    assert all(torch.equal(whole[name], pieces[name]) for name in params)


def test_the_reference_takes_one_large_tensor_and_no_copy_of_the_model() -> None:
    layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(10))).bfloat16()
    params = dict(layers.named_parameters())
    batch = Batch((torch.ones(1, 2048, dtype=torch.bfloat16),), torch.zeros(1, dtype=torch.int64))
    zero = torch.zeros(1, dtype=torch.int64)
    queries = Queries(batch, zero, Directions(Key.root(0), params, 1), zero, zero.double() + 0.1)
    one = 2 * 2048**2
    with torch.no_grad(), LiveBytes(torch.device("cpu")) as live:
        sequential.run(layers, params, queries, lambda out, rows: out.float().sum(1), block=1)
    # What is copied whole, the tensor in use, and pieces of it in float32.
    assert live.peak < sequential._COPIED_BYTES + 3 * one + 3 * 4 * sequential._AT_ONCE


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
@pytest.mark.parametrize("directions", [3, 40])
def test_a_gradient_in_a_short_dtype_is_the_rounded_one(
    law: str, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fwdlearn.directions._EXPAND_BYTES", 4000)
    monkeypatch.setattr("fwdlearn.directions._PIECE", 1000)
    value = torch.zeros(70, 30, dtype=torch.bfloat16)
    family = Directions(Key.root(1), {"w": value}, directions, law, 2, {"w": 0.5})
    coefficients = Key.root(2).uniform(directions) - 0.5
    gradient = DirectionGradient(family, coefficients)
    found, square = update_of(gradient, "w", value)
    assert found.dtype == torch.bfloat16 and found.shape == value.shape
    plain = gradient["w"]
    torch.testing.assert_close(found.float(), plain, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(square, plain.square().sum(), rtol=1e-5, atol=0.0)


def test_it_takes_no_float32_gradient() -> None:
    value = torch.zeros(16384, 1024, dtype=torch.bfloat16)
    gradient = DirectionGradient(Directions(Key.root(0), {"w": value}, 4), torch.ones(4))
    with LiveBytes(torch.device("cpu")) as live:
        update_of(gradient, "w", value)
    assert live.peak < value.nbytes + 3 * 2**24


def test_a_short_sum_in_place_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key.root(3)
    one, other = (key.fold(n).uniform(60).bfloat16().view(6, 10) for n in ("one", "other"))
    with arithmetic.Alike():
        whole = one.clone().add_(other, alpha=-0.3)
        monkeypatch.setattr(arithmetic, "_AT_ONCE", 7)
        pieces, turned = one.clone().add_(other, alpha=-0.3), one.T.clone().T
        turned.add_(other, alpha=-0.3)
    assert torch.equal(whole, pieces) and torch.equal(whole, turned)


def test_perturbed_weights_are_to_torch_what_the_parameters_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a weight that needs no gradient, `linear` makes a copy for each row of a sliced input."""
    seen = []

    class Spy(AtUse):
        def _seen(self, value: Tensor) -> Tensor:
            found = super()._seen(value)
            if found is not value:
                seen.append((found.requires_grad, found.is_inference()))
            return found

    monkeypatch.setattr(sequential, "AtUse", Spy)
    monkeypatch.setattr(sequential, "_COPIED_BYTES", 0)
    model, queries = parts(Tied)
    with torch.inference_mode():
        losses(model, queries)
    assert seen and set(seen) == {(True, False)}
