"""Entries of a table that no row looks up have no gradient, and directions leave them alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.arithmetic import SHORT, alike
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions, ReadParams
from fwdlearn.engine import Engine
from fwdlearn.estimators import SPSA, ForwardGradient, RandomPerturbation
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.ledger.records import Ledger, LedgerWriter, Record, same
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle
from fwdlearn.products import gram
from fwdlearn.update import handed

IDS = torch.tensor([[3, 5, 3], [1, 5, 9], [3, 3, 3]])
READ = [1, 3, 5, 9]


class Words(nn.Module):
    """Words and places, then a layer; a head on the same table where it is tied."""

    def __init__(self, tied: bool = False, late: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(12, 6), nn.Embedding(8, 6)
        self.layer, self.tied, self.late = nn.Linear(6, 6), tied, late

    def forward(self, ids: Tensor) -> Tensor:
        # Reading a dtype is no use of the table.
        x = self.words(ids).to(self.words.weight.dtype)
        if self.late:
            x = self.layer(x)
        x = self.layer(x + self.places(torch.arange(ids.shape[1])))
        return (x @ self.words.weight.T if self.tied else x).mean(1)


def oracle(**kind: bool) -> ModelOracle:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Words(**kind).double().eval()
    return ModelOracle(Engine(model, cross_entropy), Batch((IDS,), torch.arange(3)))


def test_tables_are_read_where_they_are_nothing_else() -> None:
    found = oracle().params.entries  # type: ignore[attr-defined]
    assert {name: value.tolist() for name, value in found.items()} == {
        "words.weight": READ,
        "places.weight": [0, 1, 2],
    }
    assert set(oracle(tied=True).params.entries) == {"places.weight"}  # type: ignore[attr-defined]
    # What is looked up after another layer would take that layer to find out.
    assert set(oracle(late=True).params.entries) == {"words.weight"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
@pytest.mark.parametrize("rank", [None, 1, 2])
def test_directions_are_zero_elsewhere_and_the_same_where_it_is_read(
    law: str, rank: int | None
) -> None:
    params = {"w": torch.zeros(12, 6), "b": torch.zeros(5)}
    entries = {"w": torch.tensor(READ)}
    part = Directions(Key.root(0), ReadParams(params, lambda: entries), 3, law, rank, {"w": 0.5})
    whole = Directions(Key.root(0), params, 3, law, rank, {"w": 0.5})
    ids = torch.arange(3)
    dense, full = part.dense("w", ids), whole.dense("w", ids)
    assert torch.equal(dense[:, READ], full[:, READ])
    assert not dense.sum(2)[:, [0, 2, 4]].any()
    norms = sum(part.dense(name, ids).double().flatten(1).square().sum(1) for name in params)
    torch.testing.assert_close(part.square_norms(ids), norms)
    torch.testing.assert_close(gram(part, ids[None])[0].diagonal(), norms)
    coefficients = torch.tensor([0.5, -2.0, 1.0])
    grad = DirectionGradient(part, coefficients)["w"]
    torch.testing.assert_close(grad, torch.tensordot(coefficients, dense, 1) / 0.25)


@pytest.mark.parametrize("estimator", [RandomPerturbation(), SPSA(), ForwardGradient()])
def test_estimates_leave_them_alone(estimator: RandomPerturbation | SPSA | ForwardGradient) -> None:
    asked = oracle()
    made, _ = estimator.estimate(
        asked, asked.params, None, key=Key.root(1), plan=Plan.uniform(3, 4)
    )
    grad = made.grad["words.weight"]
    assert grad[READ].abs().sum(1).all()
    assert not torch.cat((grad[:1], grad[2:3], grad[6:9], grad[10:])).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}])
def test_an_update_is_that_of_the_whole_gradient(
    dtype: torch.dtype, settings: dict[str, float]
) -> None:
    start = Key.root(2).uniform(72).to(dtype).view(12, 6)
    entries = {"w": torch.tensor(READ)}
    family = Directions(Key.root(0), ReadParams({"w": start}, lambda: entries), 3)
    gradient = DirectionGradient(family, torch.tensor([0.5, -2.0, 1.0]))
    known, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [torch.optim.SGD([one], lr=0.1, **settings) for one in (known, plain)]
    for _ in range(2):
        with torch.no_grad(), alike(dtype in SHORT):
            with handed(optimizers[0], gradient, "w", known):
                optimizers[0].step()
            plain.grad = gradient["w"].to(dtype)
            optimizers[1].step()
    assert torch.equal(known, plain) and known.grad is None
    assert optimizers[0].param_groups[0]["params"][0] is known


def test_a_record_keeps_the_entries(tmp_path: Path) -> None:
    entries = {"a": torch.tensor([0, 7, 70_000]), "b": torch.arange(300)}
    records = [
        Record(1, 4, 0, 0.5, 0.1, True, torch.ones(2), entries),
        Record(2, 4, 0, 0.5, 0.1, False, None, {}),
        Record(3, 4, 0, 0.5, 0.1, True, torch.ones(3, dtype=torch.float64), {"b": entries["b"]}),
    ]
    path = tmp_path / "ledger.bin"
    LedgerWriter.create(path, {}, records).close()
    assert all(same(*pair) for pair in zip(Ledger(path), records, strict=True))
    whole = path.read_bytes()
    ends = [Ledger(path).end_of(step) for step in range(4)]
    # Cut anywhere, it holds the records that are whole.
    for end in range(ends[0], len(whole)):
        path.write_bytes(whole[:end])
        assert Ledger(path).steps == sum(end >= one for one in ends[1:])
