"""Tangents of the operations that hold most parameters: products, lookups, convolutions.

All K tangents of the input go through the weight in one product, and a low-rank direction adds a
thin one: for y = x W.T + c and directions a b.T of W and e of c, dy = dx W.T + (x b) a.T + e.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.engine.dual import Call
from fwdlearn.engine.dual_generic import generic, multilinear
from fwdlearn.engine.dual_private import by_row, constant
from fwdlearn.engine.tangents import Leaf, first, last
from fwdlearn.engine.trace import Rows, TraceError


def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() != 2 or call.dual.is_made(input):
        return _otherwise(call)
    return _product(call, input, weight.T, call.leaf(weight), bias)


def matmul(call: Call, input: Tensor, other: Tensor, **kwargs: Any) -> Any:
    leaf = call.leaf(other)
    if kwargs or other.dim() != 2 or input.dim() < 2 or call.dual.is_made(input):
        return _otherwise(call) if kwargs or call.use else multilinear(call)
    return _product(call, input, other, None if leaf is None else leaf.transposed(), None)


def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any) -> Any:
    if kwargs or input.dim() != 1 or call.dual.is_made(mat1):
        return _otherwise(call)
    leaf = call.leaf(mat2)
    return _product(call, mat1, mat2, None if leaf is None else leaf.transposed(), input)


def _product(call: Call, x: Tensor, weight: Tensor, leaf: Leaf | None, bias: Tensor | None) -> Any:
    """The operation, whose result is `x @ weight + bias`; `leaf` is that of `weight.T`."""
    shift, rows = call.leaf(bias), call.rows(x)
    own = any(part is not None and part.rows is not None for part in (leaf, shift))
    if own and (rows is None or rows.axis == x.dim() - 1):
        return by_row(call, *call.args, **call.kwargs)
    out, dx = call.plain(), call.tangent(x)
    if dx is None and leaf is None and shift is None:
        return out
    count = next(
        len(t.entries()) if isinstance(t, Leaf) else len(t)
        for t in (dx, shift, leaf)
        if t is not None
    )
    tangent = out.new_empty(count, *out.shape)
    if own:
        assert rows is not None
        seen, into = first(x, rows, call.count), first(tangent, rows, call.count, lead=1)
    else:
        seen, into = x.unsqueeze(0), tangent.unsqueeze(1)
    filled = thin(into, seen.to(out.dtype), leaf, shift)
    if dx is not None:
        flat, wide = tangent.view(-1, out.shape[-1]), dx.reshape(-1, dx.shape[-1]).to(out.dtype)
        # Accumulated by the product itself: one sweep over the tangents less.
        torch.addmm(flat, wide, weight.to(out.dtype), beta=int(filled), out=flat)
    return call.carry(out, tangent)


def thin(into: Tensor, x: Tensor, leaf: Leaf | None, shift: Leaf | None) -> bool:
    """Writes what weight and bias contribute; False where neither moves.

    Args:
        into: [K, rows, ..., m].
        x: [rows, ..., n].
    """
    middle = [1] * (into.dim() - 3)
    base = None if shift is None else shift.entries().to(into.dtype).unflatten(1, (-1, *middle))
    if leaf is None:
        if base is not None:
            into.copy_(base)
        return base is not None
    flat = x.reshape(len(x), -1, x.shape[-1])
    if leaf.thin is None:
        for into_one, one in zip(into, leaf.entries().to(into.dtype), strict=True):
            into_one.copy_((flat @ one.transpose(1, 2)).view(into_one.shape))
        if base is not None:
            into.add_(base)
        return True
    left, right = leaf.left(into.dtype), leaf.right(into.dtype)
    columns = right.permute(1, 2, 0, 3).flatten(2)
    inner = (flat @ columns).view(*x.shape[:-1], len(into), left.shape[-1])
    for rank in range(left.shape[-1]):
        factor = inner[..., rank].movedim(-1, 0).unsqueeze(-1)
        outer = left[..., rank].unflatten(1, (-1, *middle))
        if rank:
            into.addcmul_(factor, outer)
        elif base is not None:
            torch.addcmul(base, factor, outer, out=into)
        else:
            torch.mul(factor, outer, out=into)
    return True


def transpose(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A parameter's transpose stays thin."""
    out, leaf = call.plain(), call.leaf(input)
    if leaf is None or input.dim() != 2:
        return constant(call, input, *args, **kwargs)
    same = out.stride() == input.stride() and out.shape == input.shape
    return call.carry(out, leaf if same else leaf.transposed())


def embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if max_norm is not None:
        raise TraceError("an embedding with max_norm writes into its weight")
    rows = call.rows(input)
    if call.use is not None and rows is None:
        return by_row(call, *call.args, **call.kwargs)
    index = input.unsqueeze(0) if rows is None else first(input, rows, call.count)
    flat = index.reshape(len(index), -1)
    name, factors = call.dual.names.get(id(weight)), call.dual.factors
    if name is not None and factors.family.sites[name].rank:
        # Only the rows that are looked up: a vocabulary is long.
        thin = factors.picked(name, flat.repeat(call.dual.count, 1))
        taken = (thin.left * thin.scale) @ thin.right.transpose(1, 2)
    else:
        leaf = call.leaf(weight)
        if leaf is None:
            return call.plain()
        row = torch.arange(len(flat), device=flat.device)[:, None]
        taken = leaf.entries()[:, row, flat]
    out = call.plain()
    tangent = taken.reshape(-1, *index.shape, out.shape[-1])
    return call.carry(out, tangent.squeeze(1) if rows is None else last(tangent, rows, lead=1))


def conv(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    leaf, shift, dx = call.leaf(weight), call.leaf(bias), call.tangent(input)
    own = any(part is not None and part.rows is not None for part in (leaf, shift))
    spatial = weight.dim() - 2
    if (
        call.dual.is_made(input)
        or input.dim() != spatial + 2
        or (own and call.rows(input) != Rows(0))
    ):
        return _otherwise(call)

    def run(image: Tensor, kernel: Tensor, groups: int) -> Tensor:
        return call.func(image, kernel, None, stride, padding, dilation, groups)

    out = call.plain()
    total = None
    if dx is not None:
        total = run(dx.flatten(0, 1), weight, groups).view(len(dx), *out.shape)
    if leaf is not None:
        part = _kernels(leaf, input, out, groups, run)
        total = part if total is None else total.add_(part)
    if shift is not None:
        part = shift.entries().reshape(shift.count, -1, len(weight), *[1] * spatial)
        total = part.expand(-1, *out.shape).clone() if total is None else total.add_(part)
    return out if total is None else call.carry(out, total)


def _kernels(leaf: Leaf, input: Tensor, out: Tensor, groups: int, run: Any) -> Tensor:
    """[K, *out.shape]: the images under every direction of the kernel."""
    count, channels = leaf.count, out.shape[1]
    # Rows with kernels of their own are groups of channels of one wide image.
    images = leaf.rows or 1
    wide = input if leaf.rows is None else input.reshape(1, -1, *input.shape[2:])
    inside = leaf.shape[1:]
    if leaf.thin is None or leaf.thin.left.shape[1] != channels:
        kernel = leaf.entries().to(input.dtype)
        kernel = kernel.reshape(count, images * groups, channels // groups, *inside).transpose(0, 1)
        moved = run(wide, kernel.flatten(0, 2), images * groups)
        moved = moved.view(-1, groups, count, channels // groups, *out.shape[2:])
        return moved.movedim(2, 0).reshape(count, *out.shape)
    left, right = leaf.left(input.dtype), leaf.right(input.dtype)
    rank = left.shape[-1]
    kernel = right.permute(1, 0, 3, 2).reshape(images, 1, count * rank, *inside)
    kernel = kernel.expand(-1, groups, *kernel.shape[2:]).flatten(0, 2)
    inner = run(wide, kernel, images * groups)
    inner = inner.view(-1, groups, count, rank, inner[0, 0].numel()).movedim(2, 0)
    left = left.view(count, images, groups, channels // groups, rank)
    return (left @ inner).reshape(count, *out.shape)


def _otherwise(call: Call) -> Any:
    return generic(call) if call.use is None else by_row(call, *call.args, **call.kwargs)


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
