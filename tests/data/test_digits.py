from __future__ import annotations

import sys

import pytest
import torch

from fwdlearn.data import Rows, digits
from fwdlearn.errors import MissingError, UsageError

pytest.importorskip("sklearn")


def rows_of(data: object) -> Rows:
    assert isinstance(data, Rows)
    return data


def test_shape_range_and_stratified_split() -> None:
    data = digits()
    train, test = rows_of(data.train), rows_of(data.evaluation)
    assert data.info.kind == "image"
    assert data.info.shape == (1, 8, 8)
    assert data.info.classes == data.info.outputs == 10
    assert data.info.labels == tuple("0123456789")
    assert len(train) + len(test) == 1797
    assert train.inputs.dtype == torch.float32
    assert (train.inputs.min(), train.inputs.max()) == (0, 1)
    both = torch.bincount(train.targets) + torch.bincount(test.targets)
    assert (torch.bincount(test.targets) - 0.2 * both).abs().max() <= 0.5


def test_split_depends_on_split_seed_alone() -> None:
    first, again, other = digits(), digits(), digits(split_seed=1)
    assert torch.equal(rows_of(first.train).inputs, rows_of(again.train).inputs)
    assert not torch.equal(rows_of(first.evaluation).inputs, rows_of(other.evaluation).inputs)


def test_batch_keeps_the_order_asked() -> None:
    data = digits()
    batch = data.train.batch(torch.tensor([5, 0, 5]))
    rows = rows_of(data.train)
    assert len(batch) == 3
    assert torch.equal(batch.args[0], rows.inputs[[5, 0, 5]])
    assert torch.equal(batch.targets, rows.targets[[5, 0, 5]])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"digits\(test_fraction=...\) must be above 0 and below"):
        digits(test_fraction=fraction)


def test_fraction_that_leaves_nothing() -> None:
    with pytest.raises(UsageError, match="of 1797 rows leaves one part empty; give more rows or"):
        digits(test_fraction=1e-6)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingError, match=r'pip install "fwdlearn\[data\]"'):
        digits()
