"""NumPy archives: arrays `x` and `y`, and `x_test` and `y_test` for evaluation."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fwdlearn.data.files import existing_file
from fwdlearn.data.labels import class_numbers, class_order
from fwdlearn.data.split import held_out
from fwdlearn.data.types import Data, DataInfo, Rows
from fwdlearn.errors import UsageError

Array = NDArray[np.generic]


def npz(
    path: str | Path,
    evaluation_path: str | Path | None = None,
    evaluation_fraction: float | None = None,
    split_seed: int = 0,
    channels_last: bool = False,
) -> Data:
    """Loads arrays as they are; pickled objects are refused.

    Args:
        path: an .npz file with `x` and `y`, and `x_test` and `y_test` if there are any. `x` is
            [rows, features], [rows, height, width] or [rows, channels, height, width]; bytes
            stand for 0 to 1. `y` is [rows] of integers for classification, or of floats, [rows]
            or [rows, values], for regression.
        evaluation_path: another .npz file whose `x_test` and `y_test`, or else `x` and `y`, are
            the evaluation rows.
        evaluation_fraction: share of the rows held out for evaluation, above 0 and below 1.
        split_seed: of that split alone.
        channels_last: images are [rows, height, width, channels].

    Raises:
        MissingError: no such file.
        UsageError: the file is damaged, an array is missing, has the wrong shape or type or holds
            values that are not finite, or a class occurs only in the evaluation rows.
    """
    if evaluation_path is not None and evaluation_fraction is not None:
        raise UsageError("npz: give evaluation_path or evaluation_fraction, not both.")
    file = existing_file(path, "npz(path=...)", "an .npz file")
    arrays = _arrays(file)
    inputs, raw = _pair(arrays, "x", "y", file, channels_last)
    other: tuple[Tensor, Array] | None = None
    source = file
    if evaluation_path is not None:
        source = existing_file(evaluation_path, "npz(evaluation_path=...)", "an .npz file")
        arrays = _arrays(source)
        names = ("x_test", "y_test") if "x_test" in arrays else ("x", "y")
        other = _pair(arrays, *names, source, channels_last)
    elif "x_test" in arrays:
        other = _pair(arrays, "x_test", "y_test", file, channels_last)
    if other is not None and other[0].shape[1:] != inputs.shape[1:]:
        raise UsageError(
            f"{source}: evaluation rows have the shape {tuple(other[0].shape[1:])}, training rows "
            f"{tuple(inputs.shape[1:])}; they must be the same."
        )
    kind: Literal["features", "image"] = "features" if inputs.ndim == 2 else "image"
    shape = tuple(inputs.shape[1:])
    if np.issubdtype(raw.dtype, np.integer):
        order = class_order(raw.tolist(), str(file))
        info = DataInfo(kind, shape, len(order), tuple(map(str, order)))
        targets = class_numbers(raw.tolist(), order, lambda i: f"{file}: y[{i}]")
        if other is not None:
            labels = other[1].tolist()
            other_targets = class_numbers(labels, order, lambda i: f"{source}: row {i}")
    else:
        targets = _values(raw, file)
        info = DataInfo(kind, shape, None, values=targets.shape[1])
        if other is not None:
            other_targets = _values(other[1], source)
            if other_targets.shape[1:] != targets.shape[1:]:
                raise UsageError(f"{source}: evaluation and training targets differ in shape.")
    if other is not None:
        return Data(info, Rows(inputs, targets), Rows(other[0], other_targets))
    if evaluation_fraction is not None:
        argument = "npz(evaluation_fraction=...)"
        train, test = held_out(targets, evaluation_fraction, split_seed, argument)
        return Data(info, Rows(inputs[train], targets[train]), Rows(inputs[test], targets[test]))
    return Data(info, Rows(inputs, targets))


def _arrays(path: Path) -> dict[str, Array]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{path}: not a readable .npz file of plain arrays ({error}). Write it with "
            "numpy.savez(file, x=..., y=...), numbers only: pickled objects are refused."
        ) from error


def _pair(
    arrays: dict[str, Array], x: str, y: str, path: Path, channels_last: bool
) -> tuple[Tensor, Array]:
    """Inputs as a tensor and targets as they are, checked against each other."""
    for name in (x, y):
        if name not in arrays:
            found = ", ".join(arrays) or "none"
            raise UsageError(f"{path}: there is no array {name!r}; it holds {found}.")
    inputs, targets = arrays[x], arrays[y]
    numbers = np.issubdtype(inputs.dtype, np.number) and not np.iscomplexobj(inputs)
    if not numbers or inputs.ndim not in (2, 3, 4):
        raise UsageError(
            f"{path}: {x} must be numbers [rows, features], [rows, height, width] or [rows, "
            f"channels, height, width], got {inputs.dtype} {list(inputs.shape)}."
        )
    integers = np.issubdtype(targets.dtype, np.integer)
    floats = np.issubdtype(targets.dtype, np.floating)
    if not (integers and targets.ndim == 1) and not (floats and targets.ndim in (1, 2)):
        raise UsageError(
            f"{path}: {y} must be integers [rows], or floats [rows] or [rows, values], got "
            f"{targets.dtype} {list(targets.shape)}."
        )
    if len(inputs) != len(targets) or not len(inputs) or not inputs[0].size:
        raise UsageError(
            f"{path}: {x} has the shape {list(inputs.shape)} and {y} {list(targets.shape)}; they "
            "must have equally many rows, at least one."
        )
    if inputs.dtype != np.uint8:
        with np.errstate(over="ignore"):  # an overflow is reported below, with its row
            inputs = inputs.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1))
        if len(bad):
            raise UsageError(
                f"{path}: {x}[{bad[0]}] holds a value that is not finite in float32 "
                f"({len(bad)} such rows); remove or fill them."
            )
    tensor = torch.from_numpy(np.ascontiguousarray(inputs))
    if tensor.ndim == 3:
        return tensor.unsqueeze(1), targets
    if tensor.ndim == 4 and channels_last:
        return tensor.permute(0, 3, 1, 2).contiguous(), targets
    return tensor, targets


def _values(raw: Array, path: Path) -> Tensor:
    """Targets of a regression, float32 [rows, values]."""
    if not np.issubdtype(raw.dtype, np.floating):
        raise UsageError(f"{path}: evaluation and training targets differ in type.")
    with np.errstate(over="ignore"):
        targets = torch.from_numpy(raw.astype(np.float32)).reshape(len(raw), -1)
    if not torch.isfinite(targets).all():
        raise UsageError(f"{path}: a target is not finite in float32; remove such rows.")
    return targets
