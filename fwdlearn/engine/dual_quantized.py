"""Tangents through quantised layers, whose kernels have no derivative of their own.

A layer is linear in its input, so the tangents of the input go through the layer itself, as more
rows; its virtual weight and its bias add what those of any linear layer do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fwdlearn.engine.dual import Call
from fwdlearn.engine.dual_generic import generic
from fwdlearn.engine.dual_private import by_row
from fwdlearn.engine.dual_weights import thin
from fwdlearn.engine.quantized import Product
from fwdlearn.engine.tangents import first


def rule(
    call: Call,
    input: Tensor,
    product: Product,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Any:
    """The rule for `quantized_linear`."""
    if call.dual.is_made(input):
        return generic(call) if call.use is None else by_row(call, *call.args, **call.kwargs)
    leaf, shift, dx = call.leaf(weight), call.leaf(bias), call.tangent(input)
    rows = call.rows(input)
    own = any(part is not None and part.rows is not None for part in (leaf, shift))
    if own and (rows is None or rows.axis == input.dim() - 1):
        return by_row(call, *call.args, **call.kwargs)
    moved = call.tangent(product) if isinstance(product, Tensor) else None
    if not isinstance(product, Tensor) and dx is not None:
        many = dx if input.dim() == 1 else dx.flatten(0, 1)
        moved = product(many).view(*dx.shape[:-1], -1)
    out = call.plain()
    if moved is None and leaf is None and shift is None:
        return out
    if leaf is None and shift is None:
        return call.carry(out, moved)
    tangent = out.new_empty(call.dual.count, *out.shape)
    if own:
        assert rows is not None
        seen, into = first(input, rows, call.count), first(tangent, rows, call.count, lead=1)
    else:
        seen, into = input.unsqueeze(0), tangent.unsqueeze(1)
    thin(into, seen.to(out.dtype), leaf, shift)
    return call.carry(out, tangent if moved is None else tangent.add_(moved))
