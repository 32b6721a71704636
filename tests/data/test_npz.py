from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fwdlearn.data import Rows, npz
from fwdlearn.errors import MissingError, UsageError


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


X = np.arange(30.0).reshape(10, 3)
Y = np.arange(10) % 2


def test_features_and_test_arrays(tmp_path: Path) -> None:
    data = npz(write(tmp_path / "a.npz", x=X, y=Y, x_test=X[:4], y_test=Y[:4]))
    assert (data.info.kind, data.info.shape, data.info.classes) == ("features", (3,), 2)
    assert data.evaluation is not None and len(data.evaluation) == 4
    batch = data.train.batch(torch.tensor([9]))
    assert batch.args[0].tolist() == [[27, 28, 29]] and batch.targets.tolist() == [1]


def test_byte_images(tmp_path: Path) -> None:
    x = np.full((4, 2, 5, 3), 255, dtype=np.uint8)
    data = npz(write(tmp_path / "a.npz", x=x, y=[3, 5, 3, 5]), channels_last=True)
    assert data.info.shape == (3, 2, 5) and data.info.labels == ("3", "5")
    batch = data.train.batch(torch.arange(4))
    assert batch.args[0].unique().tolist() == [1.0] and batch.targets.tolist() == [0, 1, 0, 1]
    grey = npz(write(tmp_path / "b.npz", x=x[..., 0], y=[3, 5, 3, 5]))
    assert grey.info.shape == (1, 2, 5)


def test_regression(tmp_path: Path) -> None:
    data = npz(write(tmp_path / "a.npz", x=X, y=X[:, :2]), evaluation_fraction=0.3)
    assert data.info.classes is None and data.info.outputs == 2
    assert isinstance(data.train, Rows) and data.train.targets.shape == (7, 2)


def test_evaluation_path(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", x=X, y=Y)
    data = npz(path, evaluation_path=write(tmp_path / "b.npz", x=X[:3], y=Y[:3]))
    assert data.evaluation is not None and len(data.evaluation) == 3


NAN = np.where(X == 4, np.nan, X)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "there is no array 'y'; it holds x"),
        ({"x": X, "y": Y[:-1]}, "must have equally many rows, at least one"),
        ({"x": X[:0], "y": Y[:0]}, "must have equally many rows, at least one"),
        ({"x": NAN, "y": Y}, r"x\[1\] holds a value that is not finite .*remove or fill them"),
        ({"x": X * 1e300, "y": Y}, "not finite in float32"),
        ({"x": X[:, 0], "y": Y}, r"x must be numbers \[rows, features\].* got float64 \[10\]"),
        ({"x": X.astype(complex), "y": Y}, "got complex128"),
        (
            {"x": X, "y": Y[:, None]},
            r"y must be integers \[rows\], or floats .*got int64 \[10, 1\]",
        ),
        ({"x": X, "y": Y.astype(str)}, "got <U"),
        ({"x": X, "y": Y * 0}, "every training row has the label 0; classification needs at least"),
        ({"x": X, "y": NAN[:, 1]}, "a target is not finite"),
        (
            {"x": X, "y": Y, "x_test": X, "y_test": Y + 1},
            "row 1: the label 2 does not occur in the",
        ),
        ({"x": X, "y": Y, "x_test": X[:, :2], "y_test": Y}, "they must be the same"),
        ({"x": X, "y": Y, "x_test": X}, "there is no array 'y_test'"),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y * 0.5}, r"the label 0.5 does not occur"),
        ({"x": X, "y": Y * 0.5, "x_test": X, "y_test": Y}, "targets differ in type"),
        ({"x": X.astype(object), "y": Y}, "pickled objects are refused"),
    ],
)
def test_hostile_arrays(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        npz(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x04K\x01.", b"words"])
def test_hostile_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a.npz: not a readable .npz file .*numpy.savez\(file"):
        npz(path)


def test_single_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(UsageError, match="it is a single array"):
        npz(tmp_path / "a.npy")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"npz\(path=...\): there is no .*It must be an .npz"):
        npz(tmp_path / "none.npz")
    with pytest.raises(UsageError, match="is a folder; it must be an .npz file"):
        npz(tmp_path)


def test_two_evaluations(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="npz: give evaluation_path or evaluation_fraction, not"):
        npz(tmp_path, evaluation_path=tmp_path, evaluation_fraction=0.5)
