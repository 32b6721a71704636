"""Images as a pretrained model expects them: its size, its channels, its normalisation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from fwdlearn.errors import UsageError

# Pillow's numbers, which preprocessor configurations use, and torch's names for them.
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class ImageProcessor:
    """Resizes and normalises a batch of images.

    Args:
        size: height and width that the model reads, or None to leave the size alone.
        crop_from: the shorter side before the middle of `size` is cut out, or None to resize
            straight to `size`.
        mean: of each channel, subtracted from values 0 to 1.
        std: of each channel, divided by afterwards.
        channels: of the model; grey images are repeated to fill them.
        resampling: `nearest`, `bilinear` or `bicubic`.
        dtype: of the model's weights, and so of what it is given.
    """

    size: tuple[int, int] | None
    crop_from: int | None = None
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    channels: int = 3
    resampling: str = "bilinear"
    dtype: torch.dtype = torch.float32

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        """Maps float32 [rows, channels, height, width], 0 to 1, to `pixel_values`."""
        if images.shape[1] == 1:
            images = images.expand(-1, self.channels, -1, -1)
        if images.shape[1] != self.channels:
            raise UsageError(
                f"the model reads images of {self.channels} channels, the data have "
                f"{images.shape[1]}."
            )
        if self.crop_from is not None:
            height, width = images.shape[2:]
            ratio = self.crop_from / min(height, width)
            images = self._resized(images, (round(height * ratio), round(width * ratio)))
        if self.size is not None:
            if self.crop_from is not None:
                images = _middle(images, self.size)
            images = self._resized(images, self.size)
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return {"pixel_values": ((images - mean) / std).to(self.dtype)}

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(images.shape[2:]) == size:
            return images
        if self.resampling == "nearest":
            return F.interpolate(images, size, mode="nearest-exact")
        # Antialiasing is what makes torch agree with Pillow when an image shrinks; bicubic
        # overshoots, which Pillow's bytes cannot.
        resized = F.interpolate(images, size, mode=self.resampling, antialias=True)
        return resized.clamp(0, 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], size: Any, channels: int) -> Self:
        """Reads a preprocessor configuration of transformers.

        Args:
            config: the contents of preprocessor_config.json; may be empty.
            size: the model's own image size, where the configuration names none.
            channels: of the model.
        """
        wanted = config.get("size", size)
        crop = config.get("crop_size") if config.get("do_center_crop") else None
        crop_from = None
        if isinstance(wanted, Mapping) and "shortest_edge" in wanted:
            crop_from = int(wanted["shortest_edge"])
            wanted = crop if crop is not None else (size or crop_from)
        elif crop is not None:
            crop_from, wanted = min(_pair(wanted) or (0, 0)) or None, crop
        normalise = config.get("do_normalize", True)
        mean = config.get("image_mean", [0.5] * channels) if normalise else [0.0] * channels
        std = config.get("image_std", [0.5] * channels) if normalise else [1.0] * channels
        if config.get("do_resize", True) is False:
            crop_from = None
        resampling = _RESAMPLING.get(int(config.get("resample", 2)), "bilinear")
        return cls(_pair(wanted), crop_from, tuple(mean), tuple(std), channels, resampling)

    def save(self, folder: Path) -> None:
        """Writes preprocessor_config.json, which `from_config` and transformers read."""
        config: dict[str, Any] = {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": {name: number for number, name in _RESAMPLING.items()}[self.resampling],
            "rescale_factor": 1 / 255,
        }
        if self.size is not None:
            named = {"height": self.size[0], "width": self.size[1]}
            if self.crop_from is None:
                config["size"] = named
            else:
                config["size"] = {"shortest_edge": self.crop_from}
                config |= {"crop_size": named, "do_center_crop": True}
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width out of the forms that configurations have for them."""
    if size is None:
        return None
    if isinstance(size, Mapping):
        return (int(size["height"]), int(size["width"])) if "height" in size else None
    if isinstance(size, int):
        return size, size
    return int(size[0]), int(size[1])


def _middle(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of the images, no larger than `size`."""
    top, left = (
        max(have - want, 0) // 2 for have, want in zip(images.shape[2:], size, strict=True)
    )
    return images[:, :, top : top + size[0], left : left + size[1]]
