"""Tangents of operations by what kind of function they are: any, linear, multilinear, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from fwdlearn.engine.dual import Call, HiddenError
from fwdlearn.engine.jvp import along, reason
from fwdlearn.engine.trace import TraceError, tensors


def generic(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Any operation, by torch's own forward derivative: `vmap` over the directions of `jvp`."""
    held = {
        place: t
        for place, value in enumerate(call.operands())
        if (t := call.tangent(value)) is not None
    }
    if not held:
        return call.plain()
    operands = call.operands()
    # A derivative needs memory of its own for every entry.
    primals = tuple(operands[place].contiguous() for place in held)
    made: list[Any] = []

    def run(*values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        out = _with(call, dict(zip(held, values, strict=True)))
        made[:] = [out]
        results = list(tensors(out))
        moving = tuple(r for r in results if moves(r))
        return moving, tuple(r for r in results if not moves(r))

    custom = isinstance(call.func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))

    def push(*tangents: Tensor) -> Any:
        # A custom operation without a derivative would pass for one that does not move.
        answer: Any = jvp(run, primals, tangents, has_aux=True, strict=custom)
        moving, slopes, still = answer
        return (moving, still), slopes

    try:
        (moving, still), slopes = along(push, tuple(held.values()))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:
        out = call.plain()
        if not any(map(moves, tensors(out))):
            return out
        if custom:
            raise HiddenError(f"{call.func} has no forward derivative") from error
        raise TraceError(f"{call.name}() has no forward derivative ({reason(error)})") from error
    for value, tangent in zip(moving, slopes, strict=True):
        call.carry(value, tangent)
    results_of = {True: iter(moving), False: iter(still)}
    return mapped(made[0], lambda value: next(results_of[moves(value)]))


def linear_map(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An operation that is linear in its first operand, such as a sum."""
    tangent = call.tangent(input)
    if tangent is None or sum(call.tangent(t) is not None for t in call.operands()) > 1:
        return generic(call)
    out = call.plain()
    if not all(map(moves, tensors(out))):
        return out

    def run(value: Tensor) -> Any:
        return call.func(value, *args, **kwargs)

    try:
        moved = vmap(run)(tangent)
    except (RuntimeError, ValueError):
        return generic(call)
    for value, slope in zip(tensors(out), tensors(moved), strict=True):
        call.carry(value, slope)
    return out


def multilinear(call: Call, *args: Any, **kwargs: Any) -> Any:
    """An operation that is linear in each of its operands, such as a product."""
    out, total = call.plain(), None
    for place, value in enumerate(call.operands()):
        tangent = call.tangent(value)
        if tangent is not None:
            part = vmap(lambda slope, place=place: _with(call, {place: slope}))(tangent)
            total = part if total is None else total + part
    return call.carry(out, total)


def in_place(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An operation that writes into its first operand: its twin that does not, and a copy."""
    if id(input) in call.dual.names:
        raise TraceError(f"{call.name}() writes into a parameter")
    # The twin never sees the tensor that is written to, so that results are tensors of their own.
    before, twin = call.carry(input.clone(), call.tangent(input)), _twin(call.func)
    if twin is not None:
        out = call.again(twin, before, *args, **kwargs)
    else:

        def write_copy(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            value = value.clone()
            call.func(value, *args, **kwargs)
            return value

        out = generic(replace(call, func=write_copy, args=(before, *args)))
    write(call, input, out, call.tangent(out))
    return input


def write(call: Call, target: Tensor, value: Any, tangent: Tensor | None) -> None:
    """Copies `value` and its tangents into `target` and what it is a view of."""
    held = call.tangent(target)
    target.copy_(value)
    if held is not None and tangent is not None:
        held.copy_(tangent)
    elif held is not None:
        held.zero_()
    elif tangent is not None:
        call.carry(target, tangent.to(target.dtype).expand(-1, *target.shape).clone())


def copy(call: Call, input: Tensor, src: Tensor, *args: Any) -> Tensor:
    """`copy_`: the tangents are those of the source."""
    tangent = call.tangent(src)
    if tangent is not None:
        tangent = tangent.reshape(len(tangent), *[1] * (input.dim() - src.dim()), *src.shape)
    write(call, input, src, tangent)
    return input


def moves(value: Tensor) -> bool:
    """Whether a tensor can have tangents at all."""
    return value.is_floating_point() or value.is_complex()


def mapped(value: Any, f: Callable[[Tensor], Any]) -> Any:
    """Nested values with `f` applied to every tensor, in order."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, (tuple, list)):
        items = [mapped(item, f) for item in value]
        named = hasattr(value, "_fields")
        return type(value)(*items) if named else type(value)(items)
    if isinstance(value, dict):
        return {key: mapped(item, f) for key, item in value.items()}
    return value


def _with(call: Call, values: Mapping[int, Tensor]) -> Any:
    """The operation with other operands at some places, counted as `call.operands()` does."""
    place: Iterator[int] = iter(range(10**9))

    def put(value: Tensor) -> Tensor:
        return values.get(next(place), value)

    args, kwargs = mapped((tuple(call.args), dict(call.kwargs)), put)
    return call.func(*args, **kwargs)


def _twin(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The operation that returns what `func` writes."""
    name = func.__name__
    base = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    for space in (torch.Tensor, torch, torch._C._nn):
        if (found := getattr(space, base, None)) is not None:
            return found
    return None
