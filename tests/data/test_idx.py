from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fwdlearn.data import Rows, idx
from fwdlearn.errors import MissingError, UsageError

FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(array: np.ndarray) -> bytes:
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes((0, 0, 8, array.ndim)) + shape + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = np.arange(12 * 4 * 5).reshape(12, 4, 5) % 256
    labels = np.arange(12) % 3
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images[:6])))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels[:6]))
    return tmp_path


def test_plain_and_compressed(folder: Path) -> None:
    data = idx(folder)
    assert (len(data.train), data.info.shape, data.info.classes) == (12, (1, 4, 5), 3)
    assert data.evaluation is not None and len(data.evaluation) == 6
    batch = data.train.batch(torch.tensor([11, 0]))
    assert batch.args[0].dtype == torch.float32
    assert torch.equal(batch.args[0][1].flatten(), torch.arange(20) / 255)
    assert batch.targets.tolist() == [2, 0]


def test_class_subset_is_numbered_in_the_order_given(folder: Path) -> None:
    data = idx(folder, classes=[2, 0])
    assert data.info.labels == ("2", "0")
    assert data.train.batch(torch.arange(8)).targets.tolist() == [1, 0] * 4


def test_limits_are_spread_over_the_file(folder: Path) -> None:
    data = idx(folder, train_rows=3, evaluation_rows=2)
    assert isinstance(data.train, Rows) and isinstance(data.evaluation, Rows)
    assert data.train.inputs[:, 0, 0, 0].tolist() == [0, 80, 160]
    assert len(data.evaluation) == 2


def test_evaluation_path(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((2, 4, 5))))
    (other / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1])))
    data = idx(folder, evaluation_path=other)
    assert data.evaluation is not None and len(data.evaluation) == 2


def test_without_evaluation_files(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    assert idx(folder).evaluation is None


def test_missing_folder_and_file(folder: Path) -> None:
    with pytest.raises(MissingError, match=r"idx\(path=...\): there is no .*nowhere. It must be a"):
        idx(folder / "nowhere")
    (folder / "train-images-idx3-ubyte").unlink()
    with pytest.raises(MissingError, match="neither train-images-idx3-ubyte nor train-.*.gz; give"):
        idx(folder)


Edit = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda b: b[:-1], "the header promises 12 x 4 x 5 bytes, the file holds 239; it is cut"),
        (lambda b: b + b"x", "the file holds 241"),
        (lambda b: b[:9], "the file holds 0"),
        (lambda b: b"", "begins with nothing; check that it is the right file"),
        (lambda b: b"\x00\x00\x0d\x03" + b[4:], "must begin with 00000803, this one .* 00000d03"),
        (lambda b: b"\x00\x00\x08\x01" + b[4:], "this one begins with 00000801"),
        (lambda b: b[:4] + b"\xff" * 12, "the header promises 4294967295 x"),
        (lambda b: gzip.compress(b)[:-9], "gzip data is cut off or damaged .* download the file"),
        (lambda b: gzip.compress(b)[:20] + b"\xff" * 20, "gzip data is cut off or damaged"),
        (lambda b: idx_bytes(np.zeros((0, 4, 5))), "holds no rows; it must hold at least one"),
        (lambda b: idx_bytes(np.zeros((7, 4, 5))), "holds 7 images and .* 12 labels; they must be"),
    ],
)
def test_hostile_files(folder: Path, edit: Edit, message: str) -> None:
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(edit(file.read_bytes()))
    with pytest.raises(UsageError, match=message) as caught:
        idx(folder)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("classes", [[0, 7], [1], [1, 1], [0, -1]])
def test_unknown_classes(folder: Path, classes: list[int]) -> None:
    rule = r"idx\(classes=...\) must hold two or more different classes out of \[0, 1, 2\], got"
    with pytest.raises(UsageError, match=rule):
        idx(folder, classes=classes)


def test_limit_out_of_range(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"idx\(train_rows=...\) must be at least 1, got 0"):
        idx(folder, train_rows=0)


def test_image_sizes_must_agree(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(idx_bytes(np.zeros((6, 3, 3))))
    with pytest.raises(UsageError, match=r"\(4, 5\) and evaluation images \(3, 3\); they must"):
        idx(folder)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_fashion_mnist() -> None:
    data = idx(FASHION, train_rows=1000)
    assert (len(data.train), data.info.shape, data.info.classes) == (1000, (1, 28, 28), 10)
    assert data.evaluation is not None and len(data.evaluation) == 10_000
