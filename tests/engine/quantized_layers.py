"""Layers that keep their matrix as integers: test doubles of our own, and models made of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """Weight-only int8 with one scale a row of the matrix.

    Args:
        layer: whose weight is rounded, and whose bias is taken over.
        trained: whether the scales are parameters, else buffers.
        written_out: whether the matrix is dequantised for the time of the product.
    """

    def __init__(self, layer: nn.Linear, trained: bool = False, written_out: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1) / 127
        codes = (layer.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.bias = layer.bias
        self.register_buffer("weight", codes)
        if trained:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.written_out = written_out

    def dequantized(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, input: Tensor) -> Tensor:
        if self.written_out:
            return F.linear(input, self.dequantized(), self.bias)
        out = F.linear(input, self.weight.to(input.dtype)) * self.scale
        return out if self.bias is None else out + self.bias


class Kernel(torch.autograd.Function):
    """Out of sight of torch functions, and without a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, codes.to(x.dtype)) * scale


class PackedLinear(nn.Module):
    """Holds no tensor that a module knows of, multiplies in a kernel, and has no bias."""

    bias = None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed = [Int8Linear(layer)]

    def dequantized(self) -> Tensor:
        return self.packed[0].dequantized()

    def forward(self, input: Tensor) -> Tensor:
        return Kernel.apply(input, self.packed[0].weight, self.packed[0].scale)


def quantized(model: nn.Module, layer: type[nn.Module] = Int8Linear, **settings: Any) -> nn.Module:
    """The model with its linear layers replaced, wherever they are run; a copy."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, layer(child, **settings))
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The same numbers as ordinary linear layers; a copy."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "dequantized"):
                weight = child.dequantized().detach()
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                plain = plain.to(weight.dtype)
                plain.weight.data.copy_(weight)
                plain.bias = child.bias
                setattr(module, name, plain)
    return model


class Int4Linear(nn.Module):
    """Four bits, two codes to a byte; a scale and a zero point for a group of an output's inputs.

    As GPTQ and AWQ lay them out: `scales` [groups, out_features].
    """

    def __init__(self, layer: nn.Linear, group: int = 4) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        parts = layer.weight.detach().view(self.out_features, -1, group)
        low, high = parts.amin(2), parts.amax(2)
        scales = (high - low) / 15
        zeros = (-low / scales).round()
        codes = (
            (parts / scales[..., None] + zeros[..., None]).round().clamp(0, 15).byte().flatten(1)
        )
        self.register_buffer("qweight", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("scales", scales.T.contiguous())
        self.register_buffer("zeros", zeros.T.byte())

    def dequantized(self) -> Tensor:
        codes = torch.stack((self.qweight & 15, self.qweight >> 4), 2).flatten(1)
        parts = codes.view(self.out_features, len(self.scales), -1).to(self.scales.dtype)
        shifted = parts - self.zeros.T[..., None].to(self.scales.dtype)
        return (shifted * self.scales.T[..., None]).flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.dequantized(), self.bias)


class BlockLinear(Int8Linear):
    """A scale for a block of two outputs."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.scale = self.scale.view(-1, 2).amax(1)
        codes = layer.weight.detach() / self.scale.repeat_interleave(2)[:, None]
        self.weight = codes.round().to(torch.int8)

    def forward(self, input: Tensor) -> Tensor:
        scale = self.scale.repeat_interleave(2)
        out = F.linear(input, self.weight.to(input.dtype)) * scale
        return out if self.bias is None else out + self.bias
