"""The local product of each operation: what the cotangent of its output makes of its parameters'.

Explicit formulas with the operation's own clean input; the slopes of pointwise operations come by
forward mode. Nothing records a graph. A product is a list of (operand, function of the output's
cotangent); cotangents are float32 or float64, and sums run in their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from fwdlearn.engine.fold import replaced
from fwdlearn.engine.quantized import quantized_linear
from fwdlearn.engine.trace import tensors

Pull = Callable[[Tensor], Tensor]
Product = list[tuple[Tensor | None, Pull]]

# The slope does not depend on the operands, which may be overwritten or forgotten.
_ADDITIVE = {
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), torch.add),
    **dict.fromkeys(("sub", "sub_", "__sub__", "__isub__", "subtract"), torch.sub),
    **dict.fromkeys(("rsub", "__rsub__"), torch.rsub),
}
# Each entry of the result depends on one entry of each operand.
_POINTWISE = {
    *("mul", "multiply", "div", "true_divide", "pow", "neg", "exp", "log", "sigmoid", "tanh"),
    *("__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__", "__neg__"),
    *("softplus", "clamp", "abs", "square", "sqrt", "rsqrt", "reciprocal", "relu", "silu", "gelu"),
    *("addcmul", "lerp", "where", "maximum", "minimum"),
    *("to", "float", "double", "half", "bfloat16", "type_as", "clone", "contiguous"),
}


class NoProduct(Exception):
    """There is no local product; the message is the reason that the user sees."""


def product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> Product:
    """The operands of a call whose cotangents are known, and how.

    Args:
        out: what the call returned, or one of several results.

    Raises:
        NoProduct: the operation is not known.
    """
    name = getattr(func, "__name__", str(func))
    if func in PRODUCTS:
        return PRODUCTS[func](*args, **kwargs)
    if name in _POINTWISE and "out" not in kwargs:
        return _pointwise(func, args, kwargs)
    if additive(func) and "out" not in kwargs:
        return _pointwise(_ADDITIVE[name], args, kwargs)
    for operand in tensors((args, kwargs)):
        if _storage(operand) == _storage(out) and operand.dtype == out.dtype:
            return [(operand, partial(_from_view, operand, out))]
    if name in ("reshape", "flatten"):
        return [(args[0], lambda c: c.reshape(args[0].shape))]
    raise NoProduct(f"{name} has no local product")


def additive(func: Any) -> bool:
    """Whether the product of a call needs no value of any operand."""
    return getattr(func, "__name__", "") in _ADDITIVE


def shares_memory(out: Tensor, args: Any) -> bool:
    """Whether a result lies in the memory of one of the arguments."""
    return any(_storage(operand) == _storage(out) for operand in tensors(args))


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _flat(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1]).to(like.dtype)


def _pointwise(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product:
    def pull_to(operand: Tensor) -> Pull:
        def at(value: Tensor) -> Any:
            def swap(other: Tensor) -> Tensor:
                return value if other is operand else other

            return func(*replaced(args, swap), **replaced(kwargs, swap))

        def pull(c: Tensor) -> Tensor:
            still = operand.detach()
            slope = torch.func.jvp(at, (still,), (torch.ones_like(still),))[1]
            return (c * slope).sum_to_size(operand.shape)

        return pull

    operands = {id(t): t for t in tensors((args, kwargs)) if t.is_floating_point()}
    return [(operand, pull_to(operand)) for operand in operands.values()]


def _from_view(operand: Tensor, view: Tensor, c: Tensor) -> Tensor:
    """The cotangent of a tensor from that of a view of it."""
    whole = torch.zeros_like(operand, dtype=c.dtype)
    if whole.stride() != operand.stride():
        raise NoProduct(f"a view of a tensor of strides {operand.stride()} has no local product")
    # An expanded axis holds one entry many times.
    axes = [axis for axis, step in enumerate(view.stride()) if step == 0]
    sizes = [1 if axis in axes else size for axis, size in enumerate(view.shape)]
    offset = view.storage_offset() - operand.storage_offset()
    seen = whole.as_strided(sizes, view.stride(), offset)
    seen.add_(c.sum(axes, keepdim=True) if axes else c)
    return whole


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
    return [
        (weight, lambda c: _flat(c, c).T @ _flat(input, c)),
        (bias, lambda c: _flat(c, c).sum(0)),
    ]


def _quantized(
    input: Tensor, inner: Any, weight: Tensor | None = None, bias: Tensor | None = None
) -> Product:
    return [] if weight is bias else _linear(input, weight, bias)  # type: ignore[arg-type]


def _matmul(input: Tensor, other: Tensor) -> Product:
    found: Product = []
    if other.dim() == 2:
        found.append((other, lambda c: _flat(input, c).T @ _flat(c, c)))
    elif min(input.dim(), other.dim()) > 1:
        found.append((other, lambda c: (input.to(c.dtype).mT @ c).sum_to_size(other.shape)))
    if min(input.dim(), other.dim()) > 1:
        found.append((input, lambda c: (c @ other.to(c.dtype).mT).sum_to_size(input.shape)))
    return found


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Product:
    if scales:
        raise NoProduct("addmm with beta or alpha has no local product")
    return [*_matmul(mat1, mat2), (input, lambda c: c.sum_to_size(input.shape))]


def _einsum(equation: Any, *operands: Any) -> Product:
    values = list(tensors(operands))
    left, arrow, right = str(equation).replace(" ", "").partition("->")
    if not arrow or "." in left:
        raise NoProduct("einsum without a written-out result has no local product")
    names = left.split(",")
    found: Product = []
    for number, (own, value) in enumerate(zip(names, values, strict=True)):
        rest = [(n, v) for k, (n, v) in enumerate(zip(names, values, strict=True)) if k != number]
        known = {*right, *(letter for name, _ in rest for letter in name)}
        if len(set(own)) == len(own) and known.issuperset(own):
            back = ",".join([right, *(name for name, _ in rest)]) + "->" + own
            others = [other for _, other in rest]
            found.append((value, _contraction(back, others)))
    return found


def _contraction(equation: str, others: Sequence[Tensor]) -> Pull:
    return lambda c: torch.einsum(equation, c, *(other.to(c.dtype) for other in others))


def _bilinear(left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
    def pull(c: Tensor) -> Tensor:
        return torch.einsum("no,ni,nj->oij", _flat(c, c), _flat(left, c), _flat(right, c))

    return [(weight, pull), (bias, lambda c: _flat(c, c).sum(0))]


def _prelu(input: Tensor, weight: Tensor) -> Product:
    def pull(c: Tensor) -> Tensor:
        below = c * input.to(c.dtype).clamp(max=0)
        return _channels(below) if weight.numel() > 1 else below.sum().reshape(weight.shape)

    return [(weight, pull)]


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *rest: Any,
    **more: Any,
) -> Product:
    if max_norm is not None:
        raise NoProduct("an embedding with max_norm writes into its weight")

    def pull(c: Tensor) -> Tensor:
        out = c.new_zeros(weight.shape).index_add_(0, input.flatten(), _flat(c, c))
        if padding_idx is not None:
            out[padding_idx] = 0
        return out

    return [(weight, pull)]


def _channels(c: Tensor) -> Tensor:
    """The sum over all axes but the second, along which channels lie."""
    return c.sum([axis for axis in range(c.dim()) if axis != 1])


_KERNELS = {1: grad.conv1d_weight, 2: grad.conv2d_weight, 3: grad.conv3d_weight}


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Product:
    spatial = weight.dim() - 2
    if input.dim() != weight.dim():
        raise NoProduct("a convolution without a batch axis has no local product")

    def pull(c: Tensor) -> Tensor:
        x, pad = input.to(c.dtype), padding
        if pad == "same":
            steps = (dilation,) * spatial if isinstance(dilation, int) else dilation
            total = [d * (k - 1) for d, k in zip(steps, weight.shape[2:], strict=True)]
            x = F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
        pad = 0 if isinstance(pad, str) else pad
        return _KERNELS[spatial](x, weight.shape, c, stride, pad, dilation, groups)

    return [(weight, pull), (bias, _channels)]


def _conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Product:
    def pull(c: Tensor) -> Tensor:
        # The adjoint of a convolution: input and cotangent change places.
        kernel = _KERNELS[weight.dim() - 2]
        x = input.to(c.dtype)
        return kernel(c, weight.shape, x, stride, padding, dilation, groups)

    return [(weight, pull), (bias, _channels)]


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Product:
    def gain(c: Tensor) -> Tensor:
        return c * F.layer_norm(input.to(c.dtype), normalized_shape, None, None, eps)

    shape = tuple(normalized_shape)
    return [
        (weight, lambda c: gain(c).sum_to_size(shape)),
        (bias, lambda c: c.sum_to_size(shape)),
    ]


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Product:
    least = torch.finfo(input.dtype).eps if eps is None else eps

    def pull(c: Tensor) -> Tensor:
        plain = F.rms_norm(input.to(c.dtype), normalized_shape, None, least)
        return (c * plain).sum_to_size(tuple(normalized_shape))

    return [(weight, pull)]


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Product:
    def pull(c: Tensor) -> Tensor:
        return _channels(c * F.group_norm(input.to(c.dtype), num_groups, None, None, eps))

    return [(weight, pull), (bias, _channels)]


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Product:
    if training or running_mean is None or running_var is None:
        raise NoProduct("batch normalisation in training mode mixes the rows of the batch")

    def pull(c: Tensor) -> Tensor:
        mean, var = running_mean.to(c.dtype), running_var.to(c.dtype)
        plain = F.batch_norm(input.to(c.dtype), mean, var, None, None, False, momentum, eps)
        return _channels(c * plain)

    return [(weight, pull), (bias, _channels)]


PRODUCTS: Mapping[Any, Callable[..., Product]] = {
    F.linear: _linear,
    quantized_linear: _quantized,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.einsum: _einsum,
    F.bilinear: _bilinear,
    F.prelu: _prelu,
    F.embedding: _embedding,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.conv_transpose1d: _conv_transpose,
    F.conv_transpose2d: _conv_transpose,
    F.conv_transpose3d: _conv_transpose,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
}
