"""Tangents of normalisations and of what ends a network: softmax and cross entropy.

The Jacobian of a normalisation to mean 0 and variance 1 is symmetric, so the fused kernel that
applies its transpose applies it. It is called as a function: no graph is made, nothing flows back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.engine.dual import Call
from fwdlearn.engine.dual_generic import generic
from fwdlearn.engine.dual_private import by_row
from fwdlearn.engine.tangents import spread
from fwdlearn.engine.trace import TraceError

# What tangents become before gain and shift.
Push = Callable[[Tensor], Tensor]

# Entries of the tangents that are pushed together.
_BLOCK = 2**16


def layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    shape = tuple(normalized_shape)
    normal, mean, rstd = torch.native_layer_norm(input, shape, None, None, eps)
    kernel = torch.ops.aten.native_layer_norm_backward

    def push(tangent: Tensor) -> Tensor:
        x, m, r = (_repeated(t, len(tangent)) for t in (input, mean, rstd))
        return kernel(tangent, x, shape, m, r, None, None, [True, False, False])[0]

    return _affine(call, normal, push, weight, bias)


def rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    axes = list(range(-len(tuple(normalized_shape)), 0))
    normal = F.rms_norm(input, normalized_shape, None, eps)
    small = torch.finfo(input.dtype).eps if eps is None else eps
    inverse = torch.rsqrt(input.square().mean(axes, keepdim=True) + small)

    def push(tangent: Tensor) -> Tensor:
        mean = (tangent * normal).mean(axes, keepdim=True)
        return torch.addcmul(tangent, normal, mean, value=-1).mul_(inverse)

    return _affine(call, normal, push, weight, None)


def group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    n, c, space = input.shape[0], input.shape[1], math.prod(input.shape[2:])
    values = input.contiguous()
    normal, mean, rstd = torch.native_group_norm(values, None, None, n, c, space, num_groups, eps)
    kernel = torch.ops.aten.native_group_norm_backward

    def push(tangent: Tensor) -> Tensor:
        x, m, r = (_repeated(t, len(tangent)).flatten(0, 1) for t in (values, mean, rstd))
        sizes = (len(tangent) * n, c, space, num_groups, [True, False, False])
        moved = kernel(tangent.flatten(0, 1).contiguous(), x, m, r, None, *sizes)[0]
        return moved.view(tangent.shape)

    return _affine(call, normal, push, weight, bias, channels=True)


def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        raise TraceError("batch normalisation in training mode mixes the rows of the batch")
    normal = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    inverse = torch.rsqrt(running_var + eps).view(-1, *[1] * (input.dim() - 2))
    return _affine(call, normal, lambda t: t * inverse, weight, bias, channels=True)


def _affine(
    call: Call,
    normal: Tensor,
    push: Push,
    weight: Tensor | None,
    bias: Tensor | None,
    channels: bool = False,
) -> Any:
    """The operation, with tangents `push(dx) weight + normal dweight + dbias`."""
    input = call.args[0] if call.args else call.kwargs["input"]
    rows, dx = call.rows(input), call.tangent(input)
    gain, shift = call.leaf(weight), call.leaf(bias)
    if call.use is not None and (rows is None or call.dual.is_made(input)):
        return by_row(call, *call.args, **call.kwargs)
    out, dim, count = call.plain(), input.dim(), call.dual.rows or 1
    if dx is None and gain is None and shift is None:
        return out
    # A channel lies on axis 1, so its weights are followed by one axis for each axis after it.
    tail = dim - 2 if channels else 0
    if weight is not None:
        weight = weight.reshape(*weight.shape, *[1] * tail)
    gains = None if gain is None else gain.along(dim, rows, tail).to(normal.dtype)
    shifts = None if shift is None else shift.along(dim, rows, tail).to(normal.dtype)
    shown = normal if rows is None else spread(normal, rows, count)
    moving = next(len(t) for t in (dx, gains, shifts) if t is not None)
    tangent = torch.empty(moving, *shown.shape, dtype=normal.dtype, device=normal.device)
    # Few directions at a time: they stay in the cache, and what they share is not repeated.
    size = max(1, _BLOCK // max(1, normal.numel()))
    for start in range(0, moving, size):
        some = slice(start, start + size)
        into = tangent[some]
        if gains is not None and shifts is not None:
            torch.addcmul(shifts[some], shown, gains[some], out=into)
        elif gains is not None:
            torch.mul(shown, gains[some], out=into)
        elif shifts is not None:
            into.copy_(shifts[some].expand(into.shape))
        if dx is None:
            continue
        moved, flat = push(dx[some]), into.view(-1, *normal.shape)
        if gains is not None or shifts is not None:
            flat.add_(moved) if weight is None else flat.addcmul_(moved, weight)
        else:
            flat.copy_(moved) if weight is None else torch.mul(moved, weight, out=flat)
    return call.carry(out, tangent.view(moving, *normal.shape).to(out.dtype))


def _repeated(value: Tensor, count: int) -> Tensor:
    """[count, *shape], with memory of its own for every entry."""
    return value.expand(count, *value.shape).contiguous()


def softmax(call: Call, input: Tensor, dim: int, dtype: Any = None) -> Any:
    tangent = call.tangent(input)
    out = call.plain()
    if tangent is None:
        return out
    dim = dim % input.dim() + 1 if input.dim() else dim
    moved = tangent.to(out.dtype) * out
    return call.carry(out, moved.sub_(moved.sum(dim, keepdim=True) * out))


def log_softmax(call: Call, input: Tensor, dim: int, dtype: Any = None) -> Any:
    tangent = call.tangent(input)
    out = call.plain()
    if tangent is None:
        return out
    tangent, dim = tangent.to(out.dtype), dim % input.dim() + 1 if input.dim() else dim
    return call.carry(out, tangent - (tangent * out.exp()).sum(dim, keepdim=True))


def cross_entropy(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """`log sum exp x - x[target]`: its tangent is a mean under softmax minus an entry."""
    if weight is not None or reduction or label_smoothing or target.is_floating_point():
        return generic(call)
    tangent, axis = call.tangent(input), min(1, input.dim() - 1)
    out, likely = call.plain(), input.softmax(axis)
    kept = target != ignore_index
    index = target.where(kept, 0).unsqueeze(axis)
    assert tangent is not None
    slopes = []
    # One direction at a time: classes may be a whole vocabulary.
    for one in tangent:
        mean = (one * likely).sum(axis)
        slopes.append((mean - one.gather(axis, index).squeeze(axis)).where(kept, 0.0))
    return call.carry(out, torch.stack(slopes))
