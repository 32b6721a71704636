"""A small vision transformer (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929).

Differs from the paper in its size, in the pooling (the mean of the patches unless asked otherwise)
and in keeping no separate class token: token and position 0 are always added, so the position
alone, next to a zero patch, is the same model with one parameter less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fwdlearn.data.types import DataInfo
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.models.built import Built, weights_from


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Maps images [rows, channels, height, width] to [rows, outputs]."""

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        class_token: bool,
    ) -> None:
        super().__init__()
        channels, height, image_width = shape
        tokens = (height // patch) * (image_width // patch) + class_token
        self.class_token = class_token
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        # An embedding looked up by every row, and not a bare parameter, so that rows of one batch
        # can be perturbed differently at the cost of a lookup.
        self.positions = nn.Embedding(tokens, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.register_buffer("places", torch.arange(tokens), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    places: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.class_token:
            x = F.pad(x, (0, 0, 1, 0))
        x = x + self.positions(self.places.expand(len(x), -1))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.class_token else x.mean(1))


def vit(
    info: DataInfo,
    patch: int = 4,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    hidden: int | None = None,
    pool: Literal["mean", "class"] = "mean",
    weights: str | Path | None = None,
    seed: int = 0,
) -> Built:
    """Builds a small vision transformer.

    Args:
        info: of the data; kind `image`.
        patch: side of a square patch in pixels; must divide the image's height and width.
        width: of a token, a multiple of `heads`.
        depth: number of blocks, at least 1.
        heads: of the attention, at least 1.
        hidden: width inside a block's perceptron; None is twice `width`.
        pool: what the head reads: the `mean` of the patches or a `class` token.
        weights: a safetensors file to start from, such as `model/model.safetensors` of a run, for
            all but the head, which is new.
        seed: of the weights, drawn as torch draws them for its layers; positions have a standard
            deviation of 0.02.

    Raises:
        MissingError: there is no such file.
        UsageError: the data are not images, an argument is out of range, or the weights are those
            of another model.
    """
    if info.kind != "image":
        raise UsageError(f"vit reads images, not {info.kind}; mlp reads features.")
    hidden = 2 * width if hidden is None else hidden
    sizes = {"patch": patch, "width": width, "depth": depth, "heads": heads, "hidden": hidden}
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"vit({name}=...) must be at least 1, got {value!r}.")
    height, image_width = info.shape[1:]
    if height % patch or image_width % patch:
        sides = range(1, min(height, image_width) + 1)
        fitting = ", ".join(str(n) for n in sides if height % n == 0 and image_width % n == 0)
        raise UsageError(
            f"vit(patch=...) must divide the image's {height} x {image_width} pixels, got "
            f"{patch!r}; {fitting} would."
        )
    if width % heads:
        raise UsageError(f"vit(width=...) must be a multiple of heads={heads}, got {width!r}.")
    if pool not in ("mean", "class"):
        raise UsageError(f"vit(pool=...) must be mean or class, got {pool!r}.")
    with weights_from(seed):
        module = ViT(info.shape, info.outputs, patch, width, depth, heads, hidden, pool == "class")
    if weights is not None:
        _load_all_but_the_head(module, Path(weights))
    return Built(module.eval())


def _load_all_but_the_head(module: ViT, path: Path) -> None:
    if not path.is_file():
        raise MissingError(f"vit(weights=...): there is no file {path}.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"vit(weights=...): {path} cannot be read ({error}).") from error
    own = module.state_dict()
    for name in (name for name in own if not name.startswith("head.")):
        if name not in found or found[name].shape != own[name].shape:
            there = tuple(found[name].shape) if name in found else "none"
            raise UsageError(
                f"vit(weights=...): {name} is {tuple(own[name].shape)} here and {there} in {path}; "
                "give the settings that the model was trained with."
            )
        own[name] = found[name]
    module.load_state_dict(own)
