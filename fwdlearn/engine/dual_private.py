"""Uses of parameters whose tangents differ from row to row, by the rules for all other tensors.

A parameter with tangents [K, rows, *shape] fits no rule. Seen beside the rows it is an ordinary
tensor: a table of as many equal entries as there are rows, each with K tangents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fwdlearn.engine.dual import Call
from fwdlearn.engine.dual_generic import mapped, moves
from fwdlearn.engine.tangents import Leaf, aligned, first, last, spread
from fwdlearn.engine.trace import Rows, TraceError, tensors


def constant(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Parameters in, parameters out: each row's tangents are so many more directions."""
    assert call.use is not None

    def seen(value: Tensor) -> Tensor:
        if not call.dual.is_made(value):
            return value
        leaf, alias = call.leaf(value), value.view_as(value)
        return alias if leaf is None else call.carry(alias, leaf.dense())

    args, kwargs = mapped((args, kwargs), seen)
    out = call.again(call.func, *args, **kwargs)
    for result, rows in zip(tensors(out), call.use.outputs, strict=True):
        tangent = call.tangent(result)
        if tangent is None:
            call.carry(result, None)
        elif rows is None:
            shape = result.shape
            call.carry(result, Leaf(shape, call.dual.count, call.count, full=tangent))
        else:
            # It was expanded over the rows: each keeps its own.
            own = tangent.view(call.dual.count, call.count, *result.shape)
            own = first(own, rows, call.count, lead=2).diagonal(dim1=1, dim2=2).movedim(-1, 1)
            call.carry(result, last(own, rows, lead=1))
    return out


def pointwise(call: Call, *args: Any, **kwargs: Any) -> Any:
    """An operation that works entry by entry, on operands that broadcast."""
    assert call.use is not None
    operands = call.operands()
    rows, dim = call.use.outputs[0], max(t.dim() for t in operands)
    writes = call.writes()
    if rows is None:
        return by_row(call, *args, **kwargs)
    still = [t for t in operands if not call.dual.is_made(t) and call.rows(t) is None]
    for value in still if rows.flat else ():
        axis = rows.axis - (dim - value.dim())
        if axis >= 0 and value.shape[axis] != 1:
            return by_row(call, *args, **kwargs)
    if writes:
        _ensure(call, args[0])

    def shown(value: Tensor) -> Tensor:
        where = call.rows(value)
        if call.dual.is_made(value):
            leaf = call.leaf(value)
            alias = _padded(value.view_as(value), dim, rows)
            if leaf is None:
                return alias
            tangent = leaf.along(dim, rows)
            wide = alias.expand(tangent.shape[1:])
            return call.carry(wide.contiguous(), tangent)
        seen = _padded(value, dim, rows) if where is None else spread(value, where, call.count)
        moved = call.tangent(value)
        if moved is None:
            return seen
        if where is not None:
            return call.carry(seen, spread(moved, where, call.count, lead=1))
        return call.carry(seen, aligned(moved, dim).reshape(len(moved), *seen.shape))

    seen_args, seen_kwargs = mapped((args, kwargs), shown)
    out = call.again(call.func, *seen_args, **seen_kwargs)
    if writes:
        return args[0]
    if not rows.flat:
        return out
    tangent, flat = call.tangent(out), out.flatten(rows.axis, rows.axis + 1)
    if tangent is None:
        return flat
    return call.carry(flat, tangent.flatten(rows.axis + 1, rows.axis + 2))


def by_row(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Any operation, once for each row with its own tangents."""
    assert call.use is not None
    writes = call.writes()
    if writes:
        # Parts of it must be views, so that what is written into them is written into it.
        where = call.rows(args[0])
        if where is None or where.flat:
            raise TraceError(f"{call.name}() writes a parameter across the rows of a tensor")
        _ensure(call, args[0])

    def run(row: int) -> Any:
        def one(value: Tensor) -> Tensor:
            leaf, rows = call.leaf(value), call.rows(value)
            if call.dual.is_made(value):
                alias = value.view_as(value)
                return alias if leaf is None else call.carry(alias, leaf.entries()[:, row])
            if rows is None:
                return value
            part = last(first(value, rows, call.count)[row : row + 1], rows)
            tangent = call.tangent(value)
            if tangent is None:
                return part
            mine = first(tangent, rows, call.count, lead=1)[:, row : row + 1]
            return call.carry(part, last(mine, rows, lead=1))

        own_args, own_kwargs = mapped((args, kwargs), one)
        return call.again(call.func, *own_args, **own_kwargs)

    parts = [run(row) for row in range(call.count)]
    if writes:
        return args[0]
    columns = zip(*(list(tensors(part)) for part in parts), strict=True)
    joined = iter(
        [
            _joined(call, column, rows)
            for column, rows in zip(columns, call.use.outputs, strict=True)
        ]
    )
    return mapped(parts[0], lambda _: next(joined))


def _ensure(call: Call, target: Tensor) -> None:
    """Tangents that views of `target` can be written through."""
    if call.tangent(target) is None:
        call.carry(target, target.new_zeros(call.dual.count, *target.shape))


def _joined(call: Call, parts: tuple[Tensor, ...], rows: Rows | None) -> Tensor:
    if rows is None:
        raise TraceError(f"{call.name}() mixes the rows of the batch")
    out = last(torch.cat([first(part, rows, 1) for part in parts]), rows)
    tangents = [call.tangent(part) for part in parts]
    if not moves(out) or all(t is None for t in tangents):
        return out
    columns = [
        first(part.new_zeros(call.dual.count, *part.shape) if t is None else t, rows, 1, lead=1)
        for part, t in zip(parts, tangents, strict=True)
    ]
    return call.carry(out, last(torch.cat(columns, 1), rows, lead=1))


def _padded(value: Tensor, dim: int, rows: Rows | None) -> Tensor:
    """With `dim` axes, and one more in place of rows that share theirs with other entries."""
    value = value.reshape(*[1] * (dim - value.dim()), *value.shape)
    if rows is None or not rows.flat:
        return value
    return value.unsqueeze(rows.axis + int(rows.minor))
