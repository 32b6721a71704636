"""What a frozen prefix shows: computed once a row, equal to running it, kept in memory or files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.data import Data, DataInfo, Rows, TokenRows
from fwdlearn.data.seen import Seen, seen
from fwdlearn.errors import StorageError, UsageError

TEXT = DataInfo("text", (), 2)


class Prefix(nn.Module):
    """Embeds tokens; counts the rows that it has been shown."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words = nn.Embedding(20, 3)
        self.rows = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        self.rows += len(input_ids)
        tokens = self.words(input_ids) * attention_mask.unsqueeze(-1)
        return {"tokens": tokens, "mask": attention_mask, "sums": tokens.sum(1)}


def texts(*lengths: int) -> TokenRows:
    sizes = torch.tensor(lengths)
    flat = {"input_ids": torch.arange(1, int(sizes.sum()) + 1, dtype=torch.int32) % 20}
    start = torch.cumsum(sizes, 0) - sizes
    targets = torch.arange(len(lengths)) % 2
    return TokenRows(flat, {"input_ids": 0}, start, sizes, targets, 16, 4)


def test_batches_equal_those_of_the_prefix() -> None:
    rows, prefix = texts(5, 2, 7, 1), Prefix()
    shown = seen(Data(TEXT, rows, rows), prefix).train
    assert isinstance(shown, Seen) and shown.by_token == {"tokens", "mask"}
    for index in (torch.tensor([2, 0, 2]), torch.tensor([1, 3]), torch.arange(4)):
        batch, plain = shown.batch(index), rows.batch(index)
        wanted = prefix(**plain.kwargs)
        width = batch.kwargs["mask"].shape[1]
        assert width == int(rows.lengths[index].max())
        torch.testing.assert_close(batch.kwargs["sums"], wanted["sums"])
        for name in ("tokens", "mask"):
            torch.testing.assert_close(batch.kwargs[name], wanted[name][:, :width])
        assert torch.equal(batch.targets, plain.targets)


def test_the_prefix_sees_a_row_once_however_many_epochs() -> None:
    prefix = Prefix()
    data = seen(Data(TEXT, texts(5, 2, 7), None), prefix)
    before = prefix.rows
    for _ in range(5):
        data.train.batch(torch.arange(3))
    assert prefix.rows == before and data.evaluation is None


def test_features_without_tokens() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": x / 2}

    rows = Rows(torch.arange(12.0).reshape(4, 3), torch.arange(4))
    shown = seen(Data(DataInfo("features", (3,), 4), rows), Half()).train
    index = torch.tensor([3, 1])
    torch.testing.assert_close(shown.batch(index).kwargs["y"], rows.inputs[index] / 2)


def test_files_are_found_again_and_only_for_the_same_prefix_and_rows(tmp_path: Path) -> None:
    first, again, other = Prefix(), Prefix(), Prefix()
    data = Data(TEXT, texts(5, 2, 7))
    one = seen(data, first, folder=tmp_path).train
    two = seen(data, again, folder=tmp_path).train
    assert first.rows and not again.rows
    index = torch.tensor([2, 0])
    for name, value in one.batch(index).kwargs.items():
        assert torch.equal(value, two.batch(index).kwargs[name])
    with torch.no_grad():
        other.words.weight[3] += 1
    seen(data, other, folder=tmp_path)
    seen(Data(TEXT, texts(5, 3, 7)), Prefix(), folder=tmp_path)
    assert other.rows and len(list(tmp_path.iterdir())) == 3


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    data = Data(TEXT, texts(5, 2))
    seen(data, Prefix(), folder=tmp_path)
    path = next(tmp_path.glob("*/0.bin"))
    held = bytearray(path.read_bytes())
    held[3] ^= 1
    path.write_bytes(held)
    with pytest.raises(StorageError, match="not as it was written.*remove the folder"):
        seen(data, Prefix(), folder=tmp_path)


def test_a_prefix_that_returns_something_else() -> None:
    rows = Rows(torch.zeros(2, 3), torch.arange(2))
    with pytest.raises(UsageError, match="must return a mapping of tensors"):
        seen(Data(DataInfo("features", (3,), 2), rows), nn.Identity())
