"""The matrix of models on which every rung must agree: ours, plain torch, transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.batch import Batch


def images(rows: int, channels: int = 3, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(rows, channels, size, size, generator=generator)
    return Batch((pixels,), torch.randint(0, 5, (rows,), generator=generator))


def tokens(rows: int, length: int = 7, padded: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1::2, -2:] = 0
    targets = torch.randint(0, 3, (rows,), generator=generator)
    return Batch((), targets, {"input_ids": ids, "attention_mask": mask})


def features(rows: int, width: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, width, generator=generator)
    return Batch((x,), torch.randint(0, 5, (rows,), generator=generator))


def series(rows: int, length: int = 6, width: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(rows, length, width, generator=generator)
    return Batch((x,), torch.randint(0, 5, (rows,), generator=generator))


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits, targets, reduction="none")


def next_token(output: Any, targets: Tensor) -> Tensor:
    return -output.logits.log_softmax(-1)[:, :, 5].mean(1) * (1 + targets)


class Convolutions(nn.Module):
    """Strides, dilation, groups, one and two dimensions, three kinds of normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.depth = nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False)
        self.batch = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 3, dilation=2, groups=2)
        self.line = nn.Conv1d(12, 6, 2)
        self.head = nn.Linear(6, 5)
        self.batch.running_mean += 0.3
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.batch.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.first(x)))
        x = F.relu(self.batch(self.depth(x)) + x, inplace=True)
        x = self.wide(x).flatten(2)
        return self.head(self.line(x).mean(2))


class Tied(nn.Module):
    """One matrix embeds, projects (transposed) and is sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 12)
        self.norm = nn.RMSNorm(12)
        self.out = nn.Linear(12, 60, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids)) * attention_mask[..., None]
        mixed = x @ self.embed.weight[:12].t()
        return self.out(mixed.mean(1))[:, :5] + self.embed.weight[3, :5]


class Attention(nn.Module):
    """nn.MultiheadAttention, in both layouts, on as many tokens as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, x, x, need_weights=False)[0]
        y = self.norm(x).transpose(0, 1)
        y = self.second(y, y, y)[0].transpose(0, 1)
        return self.head((x + y).mean(1))


class Odd(nn.Module):
    """Uses of parameters that no rule knows, or knows only in part."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.gain = nn.Parameter(torch.randn(8) * 0.1)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.place = nn.Parameter(torch.randn(1, 16, 8))
        self.slope = nn.PReLU(8)
        self.pair = nn.Bilinear(8, 8, 5)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.mix = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.place[:, : x.shape[1]]
        x = x * (1.0 + self.gain.float()) * torch.exp(self.scale)
        x = torch.einsum("rti,io->rto", x, self.mix)
        x = self.slope(x.flatten(0, 1)).unflatten(0, (len(x), -1))
        x, _ = self.cell(x)
        return self.pair(x[:, 0], x[:, -1])


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    objective: Callable[[Any, Tensor], Tensor] = cross_entropy
    exact: bool = True


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 5))


def _encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(48, 5))


def _own_vit() -> nn.Module:
    from fwdlearn.data import DataInfo
    from fwdlearn.models import vit

    info = DataInfo("image", (3, 16, 16), 5)
    return vit(info, patch=4, width=16, depth=2, heads=2).module


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def _hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=5,
    )
    return ViTForImageClassification(config)


CASES = {
    "mlp": Case(_mlp, features),
    "cnn": Case(Convolutions, images),
    "vit": Case(_own_vit, images),
    "bert": Case(_bert, tokens),
    "gpt2": Case(_gpt2, tokens, next_token),
    "llama": Case(_llama, tokens, next_token),
    "hf_vit": Case(_hf_vit, images),
    "tied": Case(Tied, tokens),
    "multihead_attention": Case(Attention, series),
    "encoder_layer": Case(_encoder_layer, series),
    "odd": Case(Odd, series),
}


def built(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of a case with its own weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name].build().to(dtype).eval()
