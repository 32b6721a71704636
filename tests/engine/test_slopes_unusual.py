"""Slopes of what models do beyond layers: writes, views, control flow, shapes, odd operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.keys import Key

from .models import cross_entropy
from .slope_reference import by_differences, by_jvp, check, queries

ROWS, COUNT = 3, 3


class Unusual(nn.Module):
    """[rows, 4, 6] -> [rows, 5]; `body` does something to [rows, 4, 8] with a few parameters."""

    def __init__(self, body: Callable[[Unusual, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.w = nn.Parameter(torch.randn(8, 8) * 0.4)
        self.v = nn.Parameter(torch.randn(8))
        self.s = nn.Parameter(torch.tensor(0.7))
        self.p = nn.Parameter(torch.randn(4, 8))
        self.layers = nn.ModuleList(layers)
        self.register_buffer("fixed", torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self, self.inner(x))
        return self.head(x.flatten(1, -2).mean(1) if x.dim() > 2 else x)


def in_place_chain(m: Unusual, x: Tensor) -> Tensor:
    x += m.v
    x *= 1.5
    x.mul_(m.s).sub_(0.1).clamp_(min=-0.7)
    x /= m.v.exp()
    F.relu(x, inplace=True)
    x.pow_(2)
    return x.add_(m.p, alpha=0.3)


def write_through_views(m: Unusual, x: Tensor) -> Tensor:
    flat = x.view(len(x), -1)
    flat[:, :8] *= m.v
    x[:, 1].add_(m.v)
    x.transpose(1, 2)[:, 3].mul_(m.s)
    left, right = x.chunk(2, dim=-1)
    left.add_(right)
    a, b, *_ = x.unbind(1)
    a.copy_(b * m.s)
    x[..., -1] = m.s
    x[:, 2, 1:3] = m.v[:2]
    return x


def write_by_mask(m: Unusual, x: Tensor) -> Tensor:
    x = x.masked_fill(x > 1.5, 0.2)
    x[x < -1.2] = 0.0
    x.masked_fill_(m.fixed > 0.9, 0.5)
    x[:, [0, 2]] = x[:, [1, 3]] * m.v
    return torch.where(x > 0, x * m.s, m.v)


def write_parameters_into_zeros(m: Unusual, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 0] = m.v
    out[:, 1:] = x[:, 1:] * m.s
    wide = x.new_zeros(len(x), 6, 8)
    wide[:, :2] += m.p[:2]
    wide[:, 2:] = out
    return wide


def scatter(m: Unusual, x: Tensor) -> Tensor:
    index = torch.tensor([1, 0, 3, 2]).view(1, 4, 1).expand_as(x)
    x = x.scatter(1, index, x * m.s) + x.gather(1, index)
    x = x.scatter_add(2, torch.zeros_like(index), x)
    x = x.index_add(1, torch.tensor([0, 2]), x[:, :2] * m.v)
    return x.index_copy(2, torch.tensor([1]), x[..., :1].tanh())


def control_flow(m: Unusual, x: Tensor) -> Tensor:
    for number, part in enumerate(m.p):
        if number % 2:
            continue
        x = x + part if number else x * part.sigmoid()
    while x.shape[1] > 1:
        x = x[:, 1:] + 0.5 * x[:, :-1]
    return x if x.dim() == 3 and len(x) else x.unsqueeze(1)


def expand_and_repeat(m: Unusual, x: Tensor) -> Tensor:
    token = m.v.expand(len(x), 1, -1)
    again = m.p[:1].repeat(len(x), 1, 1) + m.v[None, None].expand(len(x), -1, -1)
    each = m.v.repeat_interleave(2)[::2].tile(len(x), 1)[:, None]
    same = torch.broadcast_to(m.s, (len(x), 1, 8))
    return torch.cat([token, again, each, same, x, x.roll(1, 1).flip(-1)], 1)


def einsum(m: Unusual, x: Tensor) -> Tensor:
    x = torch.einsum("rti,io->rto", x, m.w) + torch.einsum("rti,i->rt", x, m.v)[..., None]
    x = x + torch.einsum("rti,rsi,ts->rti", x, x, m.p @ m.p.T)
    return x + torch.tensordot(x, m.w, dims=([2], [0]))


def products(m: Unusual, x: Tensor) -> Tensor:
    gram = torch.bmm(x, x.mT) / 8
    x = torch.baddbmm(x, gram, x, beta=0.5) + torch.matmul(m.p[:, :4], x) * 0.1
    x = x @ m.w + x @ m.w.T + x.matmul(m.w.t()) * 0.2 + torch.mm(x[:, 0], m.w)[:, None]
    x = x + torch.addmm(m.v, x[:, 1], m.w)[:, None] + (x @ m.v)[..., None]
    return x + torch.outer(m.v, m.v)[:4] + torch.inner(x, m.w) * torch.dot(m.v, m.v)


def made_weights(m: Unusual, x: Tensor) -> Tensor:
    lora = m.w + m.p.T @ m.p * 0.1
    x = F.linear(x, lora, m.v * m.s)
    x = F.linear(x, m.w * (m.fixed > 0))
    x = F.linear(x, torch.cat([m.w[:4], m.w[4:].neg()]))
    q, k = F.linear(x, m.w.view(2, 4, 8)[0]), F.linear(x, m.w.view(2, 4, 8)[1])
    x = torch.cat([q * k, k], -1)
    kernel = (m.w.softmax(0) * m.w.norm() / m.w.norm(dim=1, keepdim=True)).T
    return x @ kernel + m.w.sum() * 0.1 + m.w.std()


def hyper_network(m: Unusual, x: Tensor) -> Tensor:
    weights = m.layers[0](x.mean(1)).view(-1, 8, 8)
    return torch.bmm(x, weights.tanh()) + x @ (m.w * weights.mean((1, 2))[:, None, None])


def statistics(m: Unusual, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    x = x + x.logsumexp(-1, keepdim=True) + x.std(1, keepdim=True) + x.norm(dim=-1, keepdim=True)
    x = F.normalize(x, dim=-1) * m.v + x.cumsum(1) + x.amax(1, keepdim=True)
    x = x + torch.max(x, dim=1, keepdim=True).values + x.sort(-1).values + x.prod(1, True) * 0.01
    x = x * F.cosine_similarity(x, m.p, dim=-1)[..., None]
    return torch.topk(x, 3, dim=1).values + x.median(1, keepdim=True).values


def activations(m: Unusual, x: Tensor) -> Tensor:
    for f in (F.silu, F.mish, F.elu, F.hardswish, F.softplus, F.gelu, torch.sin, torch.erf):
        x = x + f(x) * m.s
    x = x + F.gelu(x, approximate="tanh") + F.leaky_relu(x, 0.2) + F.prelu(x, m.s.view(1))
    x = x + F.glu(torch.cat([x, x * m.v], -1)) + F.softmax(x, -1) + F.log_softmax(x, 1)
    x = x + torch.logaddexp(x, m.v) + torch.maximum(x, m.v) + torch.lerp(x, m.p, m.s)
    x = x + x.abs().sqrt() + (1 + x.square()).rsqrt() + 2 ** (x / 10) + x.abs().pow(m.s)
    return torch.addcmul(x, x, m.v, value=0.1) / (3 - m.s) + 1 / (2 + x.square())


def convolutions(m: Unusual, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = layer(x)
    x = F.conv1d(x, m.w[:, :4].reshape(4, 4, 2)[..., :1] * m.s, groups=1)
    x = F.conv_transpose1d(x, m.w[:4, :6].view(4, 2, 3), padding=1, groups=1)
    x = F.pad(x, (1, 1), mode="replicate") + F.pad(x, (2, 0))
    return F.interpolate(x, size=8, mode="linear") + F.avg_pool1d(x, 3, 1)[..., :8]


def pictures(m: Unusual, x: Tensor) -> Tensor:
    x = x.view(len(x), 4, 2, 4)
    for layer in m.layers:
        x = layer(x)
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-0.3), 2, 1) + F.adaptive_avg_pool2d(x, (4, 6))
    patches = F.unfold(x, (2, 2), stride=(1, 2))
    x = F.pixel_shuffle(x, 2)
    return x.flatten(1)[:, :8, None].mT + patches.flatten(1)[:, :8, None].mT


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attention_masks(m: Unusual, x: Tensor) -> Tensor:
    q, k, v = heads(x), heads(x @ m.w), heads(x * m.v)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    padding = (torch.arange(4) < 3).view(1, 1, 1, 4).expand(len(x), 1, 1, 4)
    parts = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=seen),
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
        F.scaled_dot_product_attention(q, k, v, attn_mask=padding, scale=0.3),
        F.scaled_dot_product_attention(q, k, v, attn_mask=padding.double() - 1),
        F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 1]).unsqueeze(1).expand_as(q),
        F.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3]),
        F.scaled_dot_product_attention(heads(x.detach() * 0.1), k, v),
    ]
    return torch.stack(parts).sum(0).transpose(1, 2).flatten(2)


def attention_learned_bias(m: Unusual, x: Tensor) -> Tensor:
    bias = m.w.view(1, 2, 4, 8)[..., :4]
    q = heads(x)
    x = F.scaled_dot_product_attention(q, heads(x @ m.w), q, attn_mask=bias)
    x = x + F.scaled_dot_product_attention(q, q, x, attn_mask=m.p[:, :4])
    return x.transpose(1, 2).flatten(2)


def attention_learned_keys(m: Unusual, x: Tensor) -> Tensor:
    memory = heads(m.p[None])
    x = F.scaled_dot_product_attention(heads(x), memory.expand(len(x), -1, -1, -1), heads(x))
    query = heads(m.p.expand(len(x), -1, -1))
    x = x + F.scaled_dot_product_attention(query, x, x)
    return x.transpose(1, 2).flatten(2)


def attention_grouped(m: Unusual, x: Tensor) -> Tensor:
    q, k, v = heads(x, 4), heads((x @ m.w)[..., :4]), heads((x * m.v)[..., 4:])
    mask = torch.ones(4, 4, dtype=torch.bool).triu()
    x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
    x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return x.transpose(1, 2).flatten(2)


def attention_by_hand(m: Unusual, x: Tensor) -> Tensor:
    q, k, v = heads(x), heads(x @ m.w), heads(x * m.v)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(4)
    scores = scores.masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def rotary(m: Unusual, x: Tensor) -> Tensor:
    angle = torch.arange(4)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angle), angle)).flatten(2)
    waves = torch.fft.fft(x)
    gram = (waves @ waves.mH).real.mean((1, 2), keepdim=True)
    return turned * m.v + waves.abs() + waves.real * m.s + waves.imag + gram


def layers(m: Unusual, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


def channel_layers(m: Unusual, x: Tensor) -> Tensor:
    return layers(m, x.transpose(1, 2)).transpose(1, 2)


def frozen_parts(m: Unusual, x: Tensor) -> Tensor:
    return m.layers[0](x) @ m.w


def nothing_before(m: Unusual, x: Tensor) -> Tensor:
    """What comes in is cut off in every way there is; derivatives go on."""
    with torch.no_grad():
        y = x * m.s
    return y.data + x.clone().contiguous() + x.to(x.dtype, copy=True)


def checkpointed(m: Unusual, x: Tensor) -> Tensor:
    return checkpoint(lambda y: torch.tanh(y @ m.w), x, use_reentrant=False)


def lists_and_dicts(m: Unusual, x: Tensor) -> Tensor:
    kept: dict[str, Any] = {"parts": x.split([1, 3], 1), "gain": [m.v, m.s]}
    first, rest = kept["parts"]
    x = torch.cat((first * kept["gain"][0], rest * kept["gain"][1]), dim=1)
    x = torch.hstack([x, torch.vstack([x[:1], x[1:]])]) + torch.stack([m.v, m.v]).sum(0)
    return torch.concatenate([x[:, ::2], x[:, 1::2]], 1).movedim(0, 1).swapaxes(0, 1)


def tables(m: Unusual, x: Tensor) -> Tensor:
    index = torch.arange(4).flip(0)
    x = x + F.embedding(index, m.p) + m.p[index] + m.p.index_select(0, index)
    x = x + torch.take_along_dim(m.p, index[:, None], 0) + m.w[index, index][:, None]
    chosen = (x.detach() * 0).long().sum((1, 2)) + torch.arange(len(x)) * 0 + 2
    return x + m.layers[0](chosen)[:, None] + m.p[chosen][:, None]


def several_axes(m: Unusual, x: Tensor) -> Tensor:
    """Rows second, rows and tokens as one axis in either order, rows last."""
    y = x.transpose(0, 1) + m.p[:, None]
    z = y.reshape(-1, 8) * m.v @ m.w
    z = z.view(4, len(x), 8).transpose(0, 1).flatten(0, 1) * m.v
    last = z.view(len(x), -1).T
    return (last * m.p.flatten()[:, None]).T.view(x.shape) + x


def norm(kind: str) -> nn.Module:
    from torch.nn.utils import parametrizations

    if kind == "spectral":
        return parametrizations.spectral_norm(nn.Linear(8, 8))
    dim = {"first": 0, "second": 1, "all": None}[kind]
    return parametrizations.weight_norm(nn.Linear(8, 8), dim=dim)


def built(body: Callable[[Unusual, Tensor], Tensor], made: Callable[[], list[nn.Module]]) -> Engine:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Unusual(body, *made()).double().eval()
    if body is frozen_parts:
        model.layers.requires_grad_(False)
        model.inner.requires_grad_(False)
        model.head.bias.requires_grad_(False)
    return Engine(model, cross_entropy)


def plain() -> list[nn.Module]:
    return []


CASES: dict[str, tuple[Callable[[Unusual, Tensor], Tensor], Callable[[], list[nn.Module]]]] = {
    **{
        f.__name__: (f, plain)
        for f in (
            *(in_place_chain, write_through_views, write_by_mask, write_parameters_into_zeros),
            *(scatter, control_flow, expand_and_repeat, einsum, products, made_weights),
            *(statistics, activations, attention_masks, attention_learned_bias),
            *(attention_learned_keys, attention_grouped, attention_by_hand, rotary),
            *(nothing_before, checkpointed, lists_and_dicts, several_axes),
        )
    },
    "hyper_network": (hyper_network, lambda: [nn.Linear(8, 64)]),
    "tables": (tables, lambda: [nn.Embedding(5, 8, padding_idx=2)]),
    "frozen_parts": (frozen_parts, lambda: [nn.Linear(8, 8)]),
    "convolutions": (
        convolutions,
        lambda: [
            nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular", groups=2),
            nn.Conv1d(4, 4, 1, stride=1, bias=False),
            nn.Conv1d(4, 4, 3, padding="same", dilation=2),
        ],
    ),
    "pictures": (
        pictures,
        lambda: [
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
            nn.InstanceNorm2d(4, affine=True),
            nn.BatchNorm2d(4),
            nn.ChannelShuffle(2),
            nn.ConvTranspose2d(4, 4, 2, stride=1),
        ],
    ),
    "norms": (
        layers,
        lambda: [
            nn.LayerNorm(8),
            nn.LayerNorm((4, 8)),
            nn.RMSNorm(8, eps=1e-5),
            nn.LayerNorm(8, elementwise_affine=False),
            nn.LayerNorm(8, bias=False),
            nn.GroupNorm(2, 4),
        ],
    ),
    "channel_norms": (
        channel_layers,
        lambda: [
            nn.BatchNorm1d(8),
            nn.InstanceNorm1d(8, affine=True),
            nn.GroupNorm(4, 8),
            nn.LocalResponseNorm(2),
            nn.GroupNorm(8, 8, affine=False),
        ],
    ),
    "recurrent": (
        layers,
        lambda: [
            nn.GRU(8, 8, batch_first=True),
            nn.RNN(8, 4, batch_first=True, bidirectional=True),
        ],
    ),
    "lstm": (layers, lambda: [nn.LSTM(8, 8, batch_first=True)]),
    **{
        f"weight_norm_{kind}": (layers, lambda kind=kind: [norm(kind)])
        for kind in ("first", "second", "all", "spectral")
    },
}

# `torch.func.jvp` has no derivative, or takes what is cut off from a graph for constant.
DIFFERENCES_ONLY = {
    "nothing_before",
    "attention_masks",
    "checkpointed",
    "lstm",
    "weight_norm_first",
    "weight_norm_second",
    "weight_norm_all",
}


@pytest.mark.parametrize("name", list(CASES))
def test_slopes_are_exact(name: str) -> None:
    engine = built(*CASES[name])
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, 4, 6, generator=generator, dtype=torch.float64)
    batch = Batch((x,), torch.tensor([0, 3, 1]))
    for law, rank in (("rademacher", 1), ("gaussian", None)):
        family = Directions(Key.root(1), dict(engine.params), COUNT, law, rank)
        expected = by_differences(engine, batch, family)
        if name not in DIFFERENCES_ONLY:
            check(by_jvp(engine, batch, family), expected, 1e-6, "reference")
            expected = by_jvp(engine, batch, family)
        for private in (False, True):
            row, direction = queries(ROWS, COUNT, private)
            with torch.inference_mode():
                slopes = engine.slopes(batch, row, family, direction)[1]
            close = 1e-6 if name in DIFFERENCES_ONLY else 1e-10
            check(slopes, expected[direction, row], close, f"private={private}")
    assert engine.exact.choice is not None
    assert engine.exact.choice.rung == "dual", engine.exact.choice
