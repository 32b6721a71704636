"""IDX files, the format of MNIST and Fashion-MNIST, compressed with gzip or not."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fwdlearn.data.files import existing
from fwdlearn.data.split import limited
from fwdlearn.data.types import Data, DataInfo, Rows
from fwdlearn.errors import MissingError, UsageError

_UNSIGNED_BYTES = 0x08


def idx(
    path: str | Path,
    evaluation_path: str | Path | None = None,
    classes: Sequence[int] | None = None,
    train_rows: int | None = None,
    evaluation_rows: int | None = None,
) -> Data:
    """Loads `train-*` for training and `t10k-*` for evaluation.

    Args:
        path: a folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and, if there are
            any, `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, each with or without `.gz`.
        evaluation_path: another folder to take the `t10k-*` files from.
        classes: keep only the rows of these classes and number them in this order.
        train_rows: use at most this many training rows, evenly spaced over the file.
        evaluation_rows: the same for evaluation.

    Returns:
        Images [1, height, width] with values 0 to 1 (bytes in memory), one label a row.

    Raises:
        MissingError: no such folder or file in it.
        UsageError: a file that is truncated or no IDX file, or a class that does not occur.
    """
    folder = existing(path, "idx(path=...)", "a folder of IDX files")
    images, labels = _part(folder, "train")
    present = torch.unique(labels).tolist()
    order = present if classes is None else list(classes)
    unknown = [label for label in order if label not in present]
    if unknown or len(order) < 2 or len(set(order)) < len(order):
        raise UsageError(
            f"idx(classes=...) must hold two or more different classes out of {present}, got "
            f"{order}."
        )
    train = _rows(images, labels, order, train_rows, "idx(train_rows=...)")
    evaluation = None
    if evaluation_path is not None:
        expected = "a folder with the t10k files"
        other = existing(evaluation_path, "idx(evaluation_path=...)", expected)
        evaluation_files = _part(other, "t10k")
    elif _found(folder, "t10k-images-idx3-ubyte") is not None:
        evaluation_files = _part(folder, "t10k")
    else:
        evaluation_files = None
    if evaluation_files is not None:
        limit = "idx(evaluation_rows=...)"
        evaluation = _rows(*evaluation_files, order, evaluation_rows, limit)
        if evaluation.inputs.shape[1:] != train.inputs.shape[1:]:
            raise UsageError(
                f"idx: training images are {tuple(images.shape[1:])} and evaluation images "
                f"{tuple(evaluation_files[0].shape[1:])}; they must have one size."
            )
    info = DataInfo("image", tuple(train.inputs.shape[1:]), len(order), tuple(map(str, order)))
    return Data(info, train, evaluation)


def _rows(
    images: Tensor, labels: Tensor, order: Sequence[int], limit: int | None, argument: str
) -> Rows:
    """The rows of the classes in `order`, numbered in that order, at most `limit` of them."""
    number = torch.full((256,), -1)
    number[torch.tensor(order)] = torch.arange(len(order))
    targets = number[labels.to(torch.int64)]
    kept = torch.nonzero(targets >= 0).squeeze(1)
    if not len(kept):
        raise UsageError(f"idx: no row has one of the classes {list(order)}.")
    kept = kept[limited(len(kept), limit, argument)]
    return Rows(images[kept].unsqueeze(1), targets[kept])


def _part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [rows, height, width] and labels uint8 [rows] of `train` or `t10k`."""
    paths = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        found = _found(folder, name)
        if found is None:
            raise MissingError(
                f"idx: {folder} has neither {name} nor {name}.gz; give the folder that holds the "
                "IDX files under their usual names."
            )
        paths.append(found)
    images, labels = _array(paths[0], 3), _array(paths[1], 1)
    if len(images) != len(labels):
        raise UsageError(
            f"{paths[0]} holds {len(images)} images and {paths[1]} {len(labels)} labels; they "
            "must be equally many. One of them is of another data set."
        )
    return images, labels


def _found(folder: Path, name: str) -> Path | None:
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def _array(path: Path, dimensions: int) -> Tensor:
    """The array of unsigned bytes in one file, checked before it is believed."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(
            f"{path}: the gzip data is cut off or damaged ({error}); download the file again."
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    magic = bytes((0, 0, _UNSIGNED_BYTES, dimensions))
    if data[:4] != magic:
        raise UsageError(
            f"{path}: an IDX file of {dimensions}-dimensional bytes must begin with {magic.hex()}, "
            f"this one begins with {data[:4].hex() or 'nothing'}; check that it is the right file."
        )
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if len(data) < start or len(data) - start != math.prod(shape):
        raise UsageError(
            f"{path}: the header promises {' x '.join(map(str, shape))} bytes, the file holds "
            f"{max(len(data) - start, 0)}; it is cut off or damaged, download it again."
        )
    if not math.prod(shape):
        raise UsageError(f"{path}: the file holds no rows; it must hold at least one.")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())
