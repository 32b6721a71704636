"""Which rule differentiates which operation: by the function itself, or by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.engine import dual_generic as kinds
from fwdlearn.engine import dual_norms as norms
from fwdlearn.engine import dual_ops as ops
from fwdlearn.engine import dual_private as private
from fwdlearn.engine import dual_quantized as quantized
from fwdlearn.engine import dual_weights as weights
from fwdlearn.engine.dual import Rule, writes
from fwdlearn.engine.dual_attention import attention
from fwdlearn.engine.quantized import quantized_linear

# Known as a whole, on parameters whose tangents differ from row to row too.
_WEIGHTS: Mapping[Any, Rule] = {
    F.linear: weights.linear,
    quantized_linear: quantized.rule,
    torch.matmul: weights.matmul,
    torch.mm: weights.matmul,
    Tensor.matmul: weights.matmul,
    Tensor.mm: weights.matmul,
    Tensor.__matmul__: weights.matmul,
    torch.addmm: weights.addmm,
    F.embedding: weights.embedding,
    F.conv1d: weights.conv,
    F.conv2d: weights.conv,
    F.conv3d: weights.conv,
    F.layer_norm: norms.layer_norm,
    torch.layer_norm: norms.layer_norm,
    F.rms_norm: norms.rms_norm,
    torch.rms_norm: norms.rms_norm,
    F.group_norm: norms.group_norm,
    torch.group_norm: norms.group_norm,
    F.batch_norm: norms.batch_norm,
}
# Torch names a property by the `__get__` of its descriptor.
_FLIPS: Mapping[Any, Rule] = {
    torch.t: ops.flip,
    Tensor.t: ops.flip,
    vars(torch._C.TensorBase)["T"].__get__: ops.flip,
    vars(torch._C.TensorBase)["mT"].__get__: ops.flip,
    torch.transpose: ops.transpose,
    Tensor.transpose: ops.transpose,
}
_OTHERS: Mapping[Any, Rule] = {
    vars(torch._C.TensorBase)["data"].__get__: ops.same,
    **{
        vars(torch._C.TensorBase)[part].__get__: kinds.linear_map
        for part in ("real", "imag", "H", "mH")
    },
    F.scaled_dot_product_attention: attention,
    F.gelu: ops.gelu,
    F.dropout: ops.dropout,
    F.dropout1d: ops.dropout,
    F.dropout2d: ops.dropout,
    F.dropout3d: ops.dropout,
    torch.dropout: ops.dropout,
}
_POINTWISE = {
    *("abs", "asinh", "atan", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos", "elu"),
    *("erf", "erfc", "exp", "expm1", "float_power", "hardsigmoid", "hardswish", "hardtanh"),
    *("leaky_relu", "log", "log10", "log1p", "log2", "log_sigmoid", "mish", "pow", "reciprocal"),
    *("relu", "relu6", "rpow", "rsqrt", "rtruediv", "selu", "sigmoid", "silu", "sin", "softplus"),
    *("sqrt", "square", "tan", "tanh", "threshold"),
}
_SUMS = {"add", "radd", "sub", "subtract", "rsub"}
_PRODUCTS = {"mul", "multiply", "rmul"}
_QUOTIENTS = {"div", "divide", "truediv", "true_divide"}
# Entry by entry too, and left to torch's own derivative.
_ENTRYWISE = {"addcmul", "addcdiv", "lerp", "maximum", "minimum", "where", "atan2"}
_VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"),
    *("view_as", "reshape_as"),
}
_SAME = {"contiguous", "detach", "to", "float", "double", "half", "bfloat16", "type_as", "type"}
_LINEAR = {
    *("neg", "negative", "roll", "flip", "repeat", "repeat_interleave", "tile"),
    *("index_select", "gather", "take_along_dim", "diagonal", "tril", "triu", "movedim", "cumsum"),
    *("moveaxis", "swapaxes", "swapdims", "narrow", "select"),
    *("tensor_split", "broadcast_to", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d"),
}
_MULTILINEAR = {"bmm", "mv", "dot", "einsum", "outer", "inner", "tensordot", "vecdot"}
# Nothing that they return moves.
_STILL = {
    *("get", "size", "dim", "numel", "stride", "len", "hash", "is_contiguous", "get_device"),
    *("is_floating_point", "is_complex", "data_ptr", "element_size", "eq", "ne", "lt", "le", "gt"),
    *("ge", "argmax", "argmin", "argsort", "isnan", "isfinite", "isinf", "any", "all", "sign"),
    *("floor", "ceil", "round", "trunc", "zeros_like", "ones_like", "empty_like", "full_like"),
    *("rand_like", "randn_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
    *("bool", "int", "long", "nonzero", "logical_and", "logical_or", "logical_not"),
}
_NAMES: Mapping[str, Rule] = {
    **dict.fromkeys(_POINTWISE, ops.pointwise),
    **dict.fromkeys(_SUMS, ops.add),
    **dict.fromkeys(_PRODUCTS, ops.multiply),
    **dict.fromkeys(_QUOTIENTS, ops.divide),
    **dict.fromkeys(_VIEWS, ops.reshape),
    **dict.fromkeys(_SAME, ops.same),
    **dict.fromkeys(_LINEAR, kinds.linear_map),
    **dict.fromkeys(_MULTILINEAR, kinds.multilinear),
    **dict.fromkeys(("unbind", "split", "chunk"), ops.apart),
    **dict.fromkeys(("sum", "mean"), ops.reduced),
    "permute": ops.permute,
    "getitem": ops.getitem,
    "expand": ops.expand,
    "clone": ops.clone,
    "cat": ops.cat,
    "concat": ops.cat,
    "stack": ops.stack,
    "softmax": norms.softmax,
    "log_softmax": norms.log_softmax,
    "cross_entropy_loss": norms.cross_entropy,
    "weight_norm": ops.weight_norm,
}
_BROADCAST = _POINTWISE | _SUMS | _PRODUCTS | _QUOTIENTS | _ENTRYWISE | _SAME


class DualRules:
    """The rules of the structured dual; see `dual.Rules`."""

    def __contains__(self, func: object) -> bool:
        return func in _WEIGHTS or func in _FLIPS or func in _OTHERS

    def shared(self, func: Any) -> Rule | None:
        name = getattr(func, "__name__", "")
        for table in (_WEIGHTS, _FLIPS, _OTHERS):
            if func in table:
                return table[func]
        if name == "__setitem__":
            return ops.setitem
        if name == "copy_":
            return kinds.copy
        if name in ("requires_grad_", "detach_"):
            return None
        if writes(name):
            return kinds.in_place
        if name.strip("_") in _STILL:
            return None
        return _NAMES.get(name.strip("_"), kinds.generic)

    def private(self, func: Any) -> Rule:
        if func in _WEIGHTS:
            return _WEIGHTS[func]
        name = getattr(func, "__name__", "")
        base = name[3:] if writes(name) and name.startswith("__i") else name
        return private.pointwise if base.strip("_") in _BROADCAST else private.by_row

    def constant(self, func: Any) -> Rule:
        return weights.transpose if func in _FLIPS else private.constant


DUAL_RULES = DualRules()
