"""Tangents of operations without parameters: sums, products, views, functions of each entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from fwdlearn.engine import dual_weights as weights
from fwdlearn.engine.dual import Call
from fwdlearn.engine.dual_generic import generic, linear_map, moves
from fwdlearn.engine.tangents import aligned
from fwdlearn.engine.trace import TraceError


def reshape(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Another shape for the same entries in the same order."""
    out, tangent = call.plain(), call.tangent(input)
    if tangent is None or out.dtype != input.dtype:
        return out
    return call.carry(out, tangent.reshape(len(tangent), *out.shape))


def permute(call: Call, input: Tensor, *axes: Any, dims: Any = ()) -> Any:
    tangent = call.tangent(input)
    if tangent is None:
        return call.plain()
    order = axes or dims
    order = order[0] if len(order) == 1 and not isinstance(order[0], int) else order
    return call.carry(call.plain(), tangent.permute(0, *(axis % input.dim() + 1 for axis in order)))


def transpose(call: Call, input: Tensor, dim0: int, dim1: int) -> Any:
    leaf = call.leaf(input)
    if leaf is not None and leaf.thin is not None:
        return weights.transpose(call, input, dim0, dim1)
    tangent, dims = call.tangent(input), input.dim()
    if tangent is None:
        return call.plain()
    return call.carry(call.plain(), tangent.transpose(dim0 % dims + 1, dim1 % dims + 1))


def flip(call: Call, input: Tensor) -> Any:
    """`t()`, `.T` and `.mT`: the last two axes."""
    leaf = call.leaf(input)
    if leaf is not None and leaf.thin is not None:
        return weights.transpose(call, input)
    return linear_map(call, input)


def apart(call: Call, input: Tensor, *args: Any, dim: int = 0, **kwargs: Any) -> Any:
    """Views of parts along an axis: `unbind`, and `split` and `chunk` with a size in front."""
    sized = int(call.name != "unbind")
    sizes, dims = args[:sized], args[sized:]
    tangent = call.tangent(input)
    if tangent is None or kwargs or len(dims) > 1:
        return linear_map(call, *call.args, **call.kwargs)
    out, axis = call.plain(), (dims[0] if dims else dim) % input.dim() + 1
    for part, moved in zip(out, call.func(tangent, *sizes, axis), strict=True):
        call.carry(part, moved)
    return out


def reduced(call: Call, input: Tensor, dim: Any = None, keepdim: bool = False, **more: Any) -> Any:
    """`sum` and `mean` over some axes."""
    tangent = call.tangent(input)
    if tangent is None or more or not isinstance(dim, (int, tuple, list)) or not input.dim():
        return linear_map(call, *call.args, **call.kwargs)
    axes = [dim] if isinstance(dim, int) else list(dim) or list(range(input.dim()))
    axes = [axis % input.dim() + 1 for axis in axes]
    return call.carry(call.plain(), call.func(tangent, axes, keepdim))


def getitem(call: Call, input: Tensor, index: Any) -> Any:
    whole = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, (Tensor, list)) for part in whole):
        return linear_map(call, input, index)
    tangent = call.tangent(input)
    if tangent is None:
        return call.plain()
    return call.carry(call.plain(), tangent[(slice(None), *whole)])


def setitem(call: Call, input: Tensor, index: Any, value: Any) -> None:
    if id(input) in call.dual.names:
        raise TraceError("__setitem__() writes into a parameter")
    moved, tangent = call.tangent(value), call.tangent(input)
    call.plain()
    if tangent is None:
        if moved is None:
            return
        tangent = input.new_zeros(len(moved), *input.shape)
        call.carry(input, tangent)
    for number, into in enumerate(tangent):
        into[index] = 0 if moved is None else moved[number]


def expand(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    out, tangent = call.plain(), call.tangent(input)
    if tangent is None:
        return out
    return call.carry(out, aligned(tangent, out.dim()).expand(-1, *out.shape))


def add(call: Call, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """Sums and differences."""
    out, name = call.plain(), call.name.strip("_")
    signs = {"sub": (1, -alpha), "subtract": (1, -alpha), "rsub": (-alpha, 1)}.get(name, (1, alpha))
    total = None
    for value, sign in zip((input, other), signs, strict=True):
        tangent = call.tangent(value)
        if tangent is None:
            continue
        tangent = aligned(tangent, out.dim())
        if total is not None:
            total = torch.add(total, tangent, alpha=sign)
        else:
            total = tangent if sign == 1 else tangent * sign
    if total is None:
        return out
    if sum(call.tangent(value) is not None for value in (input, other)) == 1:
        # Writing into the result must not write into the operand.
        total = total.expand(-1, *out.shape).clone(memory_format=torch.contiguous_format)
    return call.carry(out, total.expand(-1, *out.shape).to(out.dtype))


def multiply(call: Call, input: Any, other: Any) -> Any:
    out, total = call.plain(), None
    for value, factor in ((input, other), (other, input)):
        tangent = call.tangent(value)
        if tangent is not None:
            part = aligned(tangent, out.dim()) * factor
            total = part if total is None else total + part
    if total is None:
        return out
    return call.carry(out, total.expand(-1, *out.shape).to(out.dtype))


def divide(call: Call, input: Any, other: Any, **kwargs: Any) -> Any:
    moved, below = call.tangent(input), call.tangent(other)
    if kwargs or moved is None:
        return generic(call)
    out = call.plain()
    total = aligned(moved, out.dim())
    if below is not None:
        total = total - aligned(below, out.dim()) * out
    return call.carry(out, (total / other).expand(-1, *out.shape).to(out.dtype))


def pointwise(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A function of each entry: its derivative is found once and serves all directions."""
    tangent = call.tangent(input)
    # Of complex numbers, a derivative may depend on the tangent's direction.
    if tangent is None or input.is_complex() or any(t is not input for t in call.operands()):
        return generic(call)
    x = input.contiguous()
    answer: Any = jvp(lambda value: call.func(value, *args, **kwargs), (x,), (torch.ones_like(x),))
    out, slope = answer
    return call.carry(out, tangent * slope)


def gelu(call: Call, input: Tensor, approximate: str = "none") -> Any:
    tangent = call.tangent(input)
    assert tangent is not None
    slope = torch.ops.aten.gelu_backward(torch.ones_like(input), input, approximate=approximate)
    return call.carry(call.plain(), tangent * slope)


def cat(call: Call, parts: Any, dim: int = 0) -> Any:
    return _join(call, parts, dim, torch.cat, parts[0].dim())


def stack(call: Call, parts: Any, dim: int = 0) -> Any:
    return _join(call, parts, dim, torch.stack, parts[0].dim() + 1)


def _join(call: Call, parts: Any, dim: int, join: Any, dims: int) -> Any:
    if any(part.dim() != parts[0].dim() for part in parts):
        return generic(call)
    held = [call.tangent(part) for part in parts]
    count = next((len(t) for t in held if t is not None), 0)
    out = call.plain()
    if not count:
        return out
    full = [
        part.new_zeros(count, *part.shape) if t is None else t
        for part, t in zip(parts, held, strict=True)
    ]
    return call.carry(out, join(full, dim % dims + 1))


def dropout(
    call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0:
        return input
    # One mask for values and tangents; whoever names the masks names this one.
    mask = call.func(torch.ones_like(input), p, training)
    return call.again(torch.Tensor.mul_ if inplace else torch.mul, input, mask)


def weight_norm(call: Call, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """In operations that have derivatives: torch has none for it as a whole."""
    # Torch takes -1 for none: one norm for all entries.
    axes = [axis for axis in range(v.dim()) if axis != dim]

    def normed(v: Tensor, g: Tensor) -> Tensor:
        return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True))

    return call.again(normed, v, g)


def same(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The same values in another tensor. What is cut off from a graph still moves."""
    out, tangent = call.plain(), call.tangent(input)
    if tangent is None or not moves(out):
        return out
    return call.carry(out, tangent.to(out.device, out.dtype))


def clone(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    tangent = call.tangent(input)
    return call.plain() if tangent is None else call.carry(call.plain(), tangent.clone())
