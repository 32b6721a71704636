"""Image files in folders named after their classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.data.files import existing
from fwdlearn.data.labels import class_numbers, class_order
from fwdlearn.data.split import held_out
from fwdlearn.data.types import Data, DataInfo, Dataset, Rows
from fwdlearn.errors import MissingError, UsageError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_EVALUATION_FOLDERS = ("validation", "val", "test")


@dataclass(frozen=True)
class ImageFiles:
    """Images that stay on disk and are decoded batch by batch.

    Args:
        paths: one image file a row.
        targets: int64 [rows] class numbers.
        size: height and width in pixels.
        mode: `RGB` or `L`.
        exact: refuse images of another size instead of resizing them.
        transform: what a model wants done to the images of a batch (see `Data.prepared`).
    """

    paths: Sequence[Path]
    targets: Tensor
    size: tuple[int, int]
    mode: str
    exact: bool = False
    transform: Callable[[Tensor], Mapping[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Tensor) -> Batch:
        images = [decoded(self.paths[i], self.size, self.mode, self.exact) for i in index.tolist()]
        rows = Rows(torch.stack(images), self.targets[index], self.transform)
        return rows.batch(torch.arange(len(index)))

    def prepared(self, processor: object | None) -> ImageFiles:
        if processor is None or not callable(processor):
            return self
        return replace(self, transform=processor)


def image_folder(
    path: str | Path,
    evaluation_path: str | Path | None = None,
    evaluation_fraction: float | None = None,
    size: int | Sequence[int] | None = None,
    mode: Literal["RGB", "L"] = "RGB",
    in_memory: bool = True,
    split_seed: int = 0,
) -> Data:
    """Loads images from one folder a class.

    Args:
        path: a folder with `train` and, for evaluation, `validation`, `val` or `test`, each
            holding one folder a class; or a folder that holds the class folders itself.
        evaluation_path: another folder of class folders, for evaluation.
        evaluation_fraction: share of each class held out for evaluation, above 0 and below 1.
        size: height and width in pixels that every image is brought to, or one number for both;
            None requires that all images have one size.
        mode: `RGB` for three channels, `L` for one.
        in_memory: decode everything at once, a byte a value, so that broken files are found
            before the run begins; False decodes batch by batch.
        split_seed: of the split alone.

    Returns:
        Images [channels, height, width] with values 0 to 1; the class folders' names are labels.

    Raises:
        MissingError: no such folder, or Pillow is not installed.
        UsageError: no images, images of different sizes, or a file that cannot be decoded.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingError(
            'image_folder needs Pillow, which is not installed: pip install "fwdlearn[data]".'
        ) from error
    if mode not in ("RGB", "L"):
        raise UsageError(f"image_folder(mode=...) must be RGB or L, got {mode!r}.")
    if evaluation_path is not None and evaluation_fraction is not None:
        raise UsageError("image_folder: give evaluation_path or evaluation_fraction, not both.")
    folder = existing(path, "image_folder(path=...)", "a folder with one folder a class")
    train = folder / "train" if (folder / "train").is_dir() else folder
    other = None
    if evaluation_path is not None:
        expected = "a folder with one folder a class"
        other = existing(evaluation_path, "image_folder(evaluation_path=...)", expected)
    elif train != folder and evaluation_fraction is None:
        places = (folder / name for name in _EVALUATION_FOLDERS)
        other = next((place for place in places if place.is_dir()), None)
    paths, names = _listing(train)
    order = class_order(names, str(train))
    targets = class_numbers(names, order, lambda i: str(paths[i]))
    pixels = _size(size, paths[0], mode)

    def rows(paths: Sequence[Path], targets: Tensor) -> Dataset:
        if not in_memory:
            return ImageFiles(paths, targets, pixels, mode, exact=size is None)
        images = [decoded(file, pixels, mode, exact=size is None) for file in paths]
        return Rows(torch.stack(images), targets)

    info = DataInfo("image", (len(mode), *pixels), len(order), tuple(str(name) for name in order))
    if other is not None:
        other_paths, other_names = _listing(other)
        other_targets = class_numbers(other_names, order, lambda i: str(other_paths[i]))
        return Data(info, rows(paths, targets), rows(other_paths, other_targets))
    if evaluation_fraction is not None:
        argument = "image_folder(evaluation_fraction=...)"
        first, second = held_out(targets, evaluation_fraction, split_seed, argument)
        held = rows([paths[i] for i in second.tolist()], targets[second])
        return Data(info, rows([paths[i] for i in first.tolist()], targets[first]), held)
    return Data(info, rows(paths, targets))


def _listing(folder: Path) -> tuple[list[Path], list[str]]:
    """Image files and the name of each one's class, in an order that no file system decides."""
    if not folder.is_dir():
        raise UsageError(f"image_folder: {folder} is a file; it must be a folder of class folders.")
    paths: list[Path] = []
    names: list[str] = []
    for group in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if group.name.startswith("."):
            continue
        files = sorted(file for file in group.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise UsageError(
                f"{group}: the class folder holds no images ({', '.join(_SUFFIXES)}); add some or "
                "remove the folder."
            )
        paths += files
        names += [group.name] * len(files)
    if not paths:
        raise UsageError(
            f"image_folder: {folder} holds no class folders; images belong in one folder a class, "
            f"such as {folder / 'cat' / '1.png'}."
        )
    return paths, names


def _size(size: int | Sequence[int] | None, first: Path, mode: str) -> tuple[int, int]:
    if size is None:
        height, width = decoded(first, None, mode).shape[1:]
        return height, width
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(
            f"image_folder(size=...) must be a height and a width of at least 1, got {size!r}."
        )
    return pair[0], pair[1]


def decoded(path: Path, size: tuple[int, int] | None, mode: str, exact: bool = False) -> Tensor:
    """One image, uint8 [channels, height, width].

    Args:
        path: the file.
        size: height and width to bring it to, or None for its own.
        mode: `RGB` or `L`.
        exact: refuse an image of another size instead of resizing it.

    Raises:
        UsageError: the file cannot be decoded, or has another size.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            image: Image.Image = file.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{path}: not a readable image ({error}); remove the file or replace it."
        ) from error
    if size is not None and image.size != size[::-1]:
        if exact:
            raise UsageError(
                f"{path}: the image is {image.height} x {image.width}, the first one is "
                f"{size[0]} x {size[1]}; give image_folder(size=[height, width]) to resize them."
            )
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if mode == "L" else pixels.permute(2, 0, 1).contiguous()
