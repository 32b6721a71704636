"""How each operation on a parameter is perturbed in the folded pass.

A rule takes the call and the operation's own arguments, under torch's names, and returns what the
operation would have returned had every row used its own perturbed parameter. What a rule does not
cover it leaves to `call.by_row()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.engine.costs import copy_pays
from fwdlearn.engine.fold import Call, Rule, replaced
from fwdlearn.engine.quantized import fold_rule, quantized_linear
from fwdlearn.engine.queries import Repeats
from fwdlearn.engine.trace import Rows, TraceError, tensors
from fwdlearn.engine.varying import Varying

_POINTWISE = {
    *("add", "sub", "mul", "div", "true_divide", "rsub", "pow", "maximum", "minimum", "where"),
    *("radd", "rmul", "rtruediv", "rpow", "truediv", "neg", "exp", "log", "sigmoid", "tanh"),
    *("softplus", "clamp", "abs", "square", "sqrt", "rsqrt", "relu", "addcmul", "lerp", "float"),
    *("double", "half", "bfloat16", "to", "type_as", "reciprocal", "multiply", "subtract"),
    *("iadd", "isub", "imul", "itruediv", "silu", "gelu"),
}


def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    rows = call.rows(input)
    if rows is None or weight.dim() != 2 or call.fold.is_made(input):
        return call.by_row()
    if call.at_one_point() and call.fold.is_dense(weight) and not _repeats(call):
        entries = input.numel() // input.shape[-1]
        if copy_pays(input.reshape(1, entries, -1), weight.shape[0]):
            return call.written_out()
    return _product(call, input, rows, weight, bias)


def matmul(call: Call, input: Tensor, other: Tensor, **kwargs: Any) -> Any:
    if kwargs or not call.fold.is_made(other) or other.dim() != 2 or call.fold.is_made(input):
        return call.by_row()
    rows = call.rows(input)
    if rows is None or rows.axis == input.dim() - 1:
        return call.by_row()
    return _product(call, input, rows, other, None, right=True)


def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any) -> Any:
    if kwargs or not call.fold.is_made(mat2) or call.fold.is_made(mat1) or input.dim() != 1:
        return call.by_row()
    rows = call.rows(mat1)
    if rows is None or rows.axis != 0:
        return call.by_row()
    return _product(call, mat1, rows, mat2, input, right=True)


def _product(
    call: Call, x: Tensor, rows: Rows, weight: Tensor, bias: Tensor | None, right: bool = False
) -> Tensor:
    """`x` times a matrix of each row's own, plus a bias of each row's own."""

    def plain(x: Tensor) -> Tensor:
        if not right:
            return F.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    varying, shift = call.fold.grouped(weight), call.fold.grouped(bias)
    if varying is not None and right:
        varying = varying.transposed(weight.T)
    if varying is None or not call.fold.is_dense(weight):
        return _corrected(call, plain(x), x, rows, varying, shift)
    repeats = _repeats(call)
    if repeats is not None:
        # The queries of a row still see the same input: one product serves them all.
        few = plain(rows.last(rows.first(x, call.count)[repeats.first]))
        out = rows.last(rows.first(few, len(repeats.first))[repeats.inverse])
        return _corrected(call, out, x, rows, varying, shift)
    matrix = weight if right else weight.T
    n, m = matrix.shape
    out = x.new_empty(*x.shape[:-1], m)
    x_rows, y_rows = rows.first(x, call.count), rows.first(out, call.count)
    if y_rows.is_contiguous() and x_rows.is_contiguous():
        points = varying.points
    else:
        varying, points = varying.by_row(), call.count
        shift = None if shift is None else shift.by_row()
    x_points, y_points = x_rows.reshape(points, -1, n), y_rows.reshape(points, -1, m)
    if y_points.data_ptr() != out.data_ptr():
        return _corrected(call, plain(x), x, rows, varying, shift)
    # At the width of its sums: rounded by itself, a small change of a bias would be lost.
    base = bias if shift is None else shift.batched().unsqueeze(1)
    if varying.thin is not None and copy_pays(x_points, m):
        for point in range(points):
            own = None if base is None else base if base.dim() == 1 else base[point]
            copy = varying.copied(point, matrix)
            _multiply(x_points[point], copy, own, y_points[point])
        return out
    # The thin term goes in first and the product is summed on top of it: one rounding.
    varying.product(x_points, base, y_points)
    out.view(-1, m).addmm_(x.reshape(-1, n), matrix)
    return out


def _repeats(call: Call) -> Repeats | None:
    """How rows recur in operands that no perturbation has reached."""
    return call.fold.queries.repeats if call.use.clean else None


def _multiply(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)


def _corrected(
    call: Call, out: Tensor, x: Tensor, rows: Rows, varying: Varying | None, shift: Varying | None
) -> Tensor:
    """Adds to the plain product `out` what each row's weight and bias contribute."""
    y = rows.first(out, call.count)
    if varying is not None:
        varying = varying.by_row()
        x = rows.first(x, call.count)
        entries = y.reshape(call.count, -1, y.shape[-1])
        varying.add_product(entries, x.reshape(call.count, -1, x.shape[-1]))
        if entries.data_ptr() != y.data_ptr():
            y.copy_(entries.view(y.shape))
    if shift is not None:
        y += shift.by_row().dense().view(call.count, *[1] * (y.dim() - 2), -1)
    return out


def transpose(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    varying = call.fold.grouped(input)
    plain = call.func(input, *args, **kwargs)
    if varying is None or input.dim() != 2 or plain.shape != input.T.shape:
        return call.by_row()
    if plain.stride() == input.stride():
        return call.fold.carry(plain, varying)
    return call.fold.carry(plain, varying.transposed(plain))


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
    if not call.fold.is_made(weight):
        return call.by_row()
    if rows is None:
        return _looked_up(call, input, weight) if call.use.outputs == (None,) else call.by_row()
    out = F.embedding(input, weight)
    y = rows.first(out, call.count)
    flat = rows.first(input, call.count).reshape(call.count, -1)
    thin = call.fold.picked(weight, flat)
    if thin is None:
        varying = call.fold.varying(weight)
        if varying is None:
            return out
        number = torch.arange(call.count, device=flat.device)[:, None]
        y += varying.dense()[number, flat].view(y.shape)
        return out
    left = thin.left * (call.fold.queries.scale * thin.scale).to(y.dtype)[:, None, None]
    if left.shape[2] == 1:
        y.addcmul_(left.view(*y.shape[:-1], 1), _between(thin.right.transpose(1, 2), y.dim()))
    else:
        y += (left @ thin.right.transpose(1, 2)).view(y.shape)
    return out


def _looked_up(call: Call, input: Tensor, weight: Tensor) -> Tensor:
    """What each point sees of the same entries, such as positions."""
    plain, fold = F.embedding(input, weight), call.fold
    varying = fold.grouped(weight)
    if varying is None:
        return plain
    if varying.thin is None:
        assert varying.delta is not None
        seen = replace(varying, plain=plain, delta=varying.delta[:, input])
    else:
        # Left as factors: what they make is as large as an activation, and only used in passing.
        thin = replace(varying.thin, left=varying.thin.left[:, input.flatten()])
        seen = replace(varying, plain=plain, thin=thin)
    return fold.carry(plain, seen)


def _between(value: Tensor, dim: int) -> Tensor:
    """[rows, 1, n] with as many axes as make `dim`."""
    return value.view(len(value), *[1] * (dim - 2), -1)


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
    rows = call.rows(input)
    spatial = weight.dim() - 2
    if rows != Rows(0) or input.dim() != spatial + 2 or call.fold.is_made(input):
        return call.by_row()
    repeats = _repeats(call)
    if repeats is None and call.at_one_point():
        return call.written_out()
    few = input if repeats is None else input[repeats.first]
    out = call.func(few, weight, bias, stride, padding, dilation, groups)
    if repeats is not None:
        out = out[repeats.inverse]
    count, channels = call.count, weight.shape[0]
    varying = call.fold.varying(weight)
    if varying is not None:
        # Every row is a group of channels of one wide image, so that each has its own kernel.
        image = input.reshape(1, count * input.shape[1], *input.shape[2:])
        if varying.thin is None:
            kernel = varying.dense().to(input.dtype).flatten(0, 1)
            wide = call.func(image, kernel, None, stride, padding, dilation, count * groups)
            out += wide.view(out.shape)
        else:
            thin = varying.thin
            rank = thin.right.shape[-1]
            kernel = thin.right.transpose(1, 2).reshape(count, 1, rank, *weight.shape[1:])
            kernel = kernel.expand(count, groups, *kernel.shape[2:]).flatten(0, 2)
            inner = call.func(image, kernel, None, stride, padding, dilation, count * groups)
            left = thin.left.reshape(count * groups, channels // groups, rank)
            inner = inner.view(count, groups * rank, -1)
            inner = inner * (varying.scale * thin.scale).to(inner.dtype)[:, None, None]
            out += (left @ inner.view(count * groups, rank, -1)).view(out.shape)
    shift = call.fold.varying(bias)
    if shift is not None:
        out += shift.dense().view(count, channels, *[1] * spatial)
    return out


def layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    if call.rows(input) is not None and not call.fold.is_made(input) and call.at_one_point():
        return call.written_out()
    # Torch is twice as fast where there is something to multiply with.
    ones = input.new_ones(()).expand(normalized_shape).contiguous()
    return _affine(call, F.layer_norm(input, normalized_shape, ones, None, eps), weight, bias)


def rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    return _affine(call, F.rms_norm(input, normalized_shape, None, eps), weight, None)


def group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    out = F.group_norm(input, num_groups, None, None, eps)
    return _affine(call, out, weight, bias, channels=True)


def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        raise TraceError("batch normalisation in training mode mixes the rows of the batch")
    out = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(call, out, weight, bias, channels=True)


def _affine(
    call: Call, out: Tensor, weight: Tensor | None, bias: Tensor | None, channels: bool = False
) -> Tensor:
    input = call.args[0] if call.args else call.kwargs["input"]
    rows = call.rows(input)
    if rows is None or call.fold.is_made(input):
        return call.by_row()
    # A channel lies on axis 1, so its weights are followed by one axis for each axis after it.
    tail = [1] * (out.dim() - 2) if channels else []
    narrow, dim = out.dtype, out.dim()
    out = out.to(torch.promote_types(narrow, torch.float32))
    shown = _spread(out, rows, call.count)

    def seen(value: Tensor) -> Tensor:
        varying = call.fold.varying(value)
        if varying is not None:
            batched = varying.batched()
            return _aligned(batched.reshape(*batched.shape, *tail), dim, rows)
        # A row axis of its own may lie among the axes of the parameter: as above, it is size one.
        plain = value.reshape(1, *value.shape, *tail)
        return _aligned(plain, dim, rows).to(out.dtype)

    if weight is not None and bias is not None:
        torch.addcmul(seen(bias), shown, seen(weight), out=shown)
    elif weight is not None:
        shown.mul_(seen(weight))
    elif bias is not None:
        shown.add_(seen(bias))
    return out.to(narrow)


def pointwise(call: Call, *args: Any, **kwargs: Any) -> Any:
    operands = list(tensors((args, kwargs)))
    varying = {id(t): v for t in operands if (v := call.fold.varying(t)) is not None}
    rows = call.use.outputs[0] if call.use.outputs else None
    first = args[0] if args and isinstance(args[0], Tensor) else None
    name = call.func.__name__
    writes = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    if not varying or "out" in kwargs or (rows is None and not call.use.constant):
        return call.by_row()
    if writes and id(first) in varying:
        raise TraceError(f"{name}() writes into a parameter")
    dim = max(t.dim() for t in operands)
    if rows is None:
        plain = call.func(*args, **kwargs)

        def batched(value: Tensor) -> Tensor:
            if id(value) not in varying:
                return value
            full = varying[id(value)].batched()
            return full.reshape(call.count, *[1] * (dim - value.dim()), *value.shape)

        def still(value: Tensor) -> Tensor:
            return value.to(varying[id(value)].wide) if id(value) in varying else value

        seen = call.func(*replaced(args, batched), **replaced(kwargs, batched))
        # Against the plain values at the same width: their own rounding is no change.
        delta = seen - call.func(*replaced(args, still), **replaced(kwargs, still))
        wide = torch.promote_types(delta.dtype, torch.float32)
        return call.fold.carry(plain, Varying(plain, call.fold.queries.scale, delta=delta.to(wide)))

    def shown(value: Tensor) -> Tensor:
        if id(value) in varying:
            return _aligned(varying[id(value)].batched(), dim, rows)
        where = call.rows(value)
        if where is not None:
            return _spread(value, where, call.count)
        axis = rows.axis - (dim - value.dim())
        return value.unsqueeze(axis) if rows.flat and axis >= 0 else value

    constants = [t for t in operands if id(t) not in varying and call.rows(t) is None]
    axes = [rows.axis - (dim - t.dim()) for t in constants]
    if rows.flat and any(a >= 0 and t.shape[a] != 1 for a, t in zip(axes, constants, strict=True)):
        return call.by_row()
    out = call.func(*replaced(args, shown), **replaced(kwargs, shown))
    if writes:
        return first
    dtypes = [t.dtype for t in operands]
    if torch.float32 not in dtypes and torch.float64 not in dtypes:
        # The wide sums must not widen what the model goes on with.
        out = out.to(reduce(torch.promote_types, dtypes))
    return out.flatten(rows.axis, rows.axis + 1) if rows.flat else out


def _spread(value: Tensor, rows: Rows, count: int) -> Tensor:
    """A view in which the rows have an axis of their own, where they lie."""
    if not rows.flat:
        return value
    entries = value.shape[rows.axis] // count
    return value.unflatten(rows.axis, (entries, count) if rows.minor else (count, entries))


def _aligned(batched: Tensor, dim: int, rows: Rows) -> Tensor:
    """[rows, *shape] so that it broadcasts against a `_spread` tensor of `dim` axes."""
    padded = batched.reshape(len(batched), *[1] * (dim - batched.dim() + 1), *batched.shape[1:])
    if padded.shape[1 + rows.axis] != 1:
        raise TraceError(
            f"a parameter of shape {tuple(batched.shape[1:])} varies along the rows of the batch"
        )
    if rows.flat:
        return padded.movedim(0, rows.axis + int(rows.minor))
    return padded.squeeze(1 + rows.axis).movedim(0, rows.axis)


class _Rules(dict[Any, Rule]):
    """Torch functions to rules, pointwise operations by their name."""

    def __contains__(self, func: object) -> bool:
        return dict.__contains__(self, func) or _base(func) in _POINTWISE

    def get(self, func: Any, default: Any = None) -> Any:
        if dict.__contains__(self, func):
            return self[func]
        return pointwise if _base(func) in _POINTWISE else default


def _base(func: object) -> str:
    return getattr(func, "__name__", "").strip("_")


RULES: Mapping[Any, Rule] = _Rules(
    {
        F.linear: linear,
        torch.matmul: matmul,
        torch.mm: matmul,
        torch.Tensor.matmul: matmul,
        torch.Tensor.mm: matmul,
        torch.Tensor.__matmul__: matmul,
        torch.addmm: addmm,
        torch.t: transpose,
        torch.transpose: transpose,
        torch.Tensor.t: transpose,
        torch.Tensor.transpose: transpose,
        # Torch names a property by the `__get__` of its descriptor.
        vars(torch._C.TensorBase)["T"].__get__: transpose,
        vars(torch._C.TensorBase)["mT"].__get__: transpose,
        quantized_linear: fold_rule,
        F.embedding: embedding,
        F.conv1d: conv,
        F.conv2d: conv,
        F.conv3d: conv,
        F.layer_norm: layer_norm,
        torch.layer_norm: layer_norm,
        F.rms_norm: rms_norm,
        torch.rms_norm: rms_norm,
        F.group_norm: group_norm,
        torch.group_norm: group_norm,
        F.batch_norm: batch_norm,
    }
)
