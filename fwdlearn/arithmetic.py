"""Arithmetic that decides weights, rounded alike on every processor and by any number of threads.

torch's kernels round `a + b * c` once where the processor can (x86 with FMA, as every one with
AVX2, and ARM), and twice on an older one. In short floats `add` with a factor rounds once in the
body of a tensor and three times in what is left over, so where threads divide it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Numbers that are added in float32 at once.
_AT_ONCE = 2**20

SHORT = (torch.bfloat16, torch.float16)


def alike(short: bool = False) -> AbstractContextManager[object]:
    """Inside, first weights and steps of optimizers are those of every other machine.

    Nothing is in the way where torch sees to that itself.

    Args:
        short: whether there are tensors of short floats.
    """
    return Alike() if short or _old() else nullcontext()


class Alike(TorchDispatchMode):
    """Takes the place of the kernels that differ; on a CPU."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To be skipped by the compiler, torch imports it: a second, and 70 MB that stay.
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kernel, kwargs = function.overloadpacket, kwargs or {}
        of: Any = args[0] if args else None
        known: Callable[..., Tensor] | None = None
        if isinstance(of, Tensor) and not of.is_cuda:
            if of.dtype in SHORT and kernel in _ADD:
                known = _short_add
            elif _old() and of.dtype in (torch.float32, *SHORT):
                known = _FUSED.get(kernel)
        if known is None:
            return function(*args, **kwargs)
        if known is _short_add and kernel.__name__[-1] == "_" and _alike_laid(*args):
            # Some numbers at a time: in float32 a large parameter is twice as large again.
            for part, other in zip(*(t.view(-1).split(_AT_ONCE) for t in args), strict=True):
                part.copy_(_short_add(part, other, **kwargs))
            return of
        value = known(*args, **kwargs)
        return of.copy_(value) if kernel.__name__[-1] == "_" else value


@cache
def _old() -> bool:
    """Whether this processor cannot multiply and add at once."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "DEFAULT" and platform.machine() in ("x86_64", "AMD64")


def _alike_laid(one: Tensor, other: Any) -> bool:
    """Whether numbers that belong together lie at the same place of two runs of memory."""
    if not isinstance(other, Tensor) or other.shape != one.shape:
        return False
    return one.is_contiguous() and other.is_contiguous()


def _short_add(one: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """In float32, factor and all: the factor of a small step is not lost before it counts."""
    if alpha == 1 or not isinstance(other, Tensor):
        return torch.add(one, other, alpha=alpha)
    return other.float().mul_(alpha).add_(one).to(one.dtype)


def _plus(one: Tensor, two: Tensor, three: Tensor | float) -> Tensor:
    """one + two * three, rounded once to float32: double precision holds the product."""
    return (one.double() + two.double() * three).float()


def _single(value: float) -> float:
    """As kernels take a number."""
    return torch.tensor(value, dtype=torch.float32).item()


def _add(one: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    if alpha == 1 or not isinstance(other, Tensor):
        return torch.add(one, other, alpha=alpha)
    return _plus(one, other, _single(alpha))


def _addcmul(one: Tensor, two: Tensor, three: Tensor, *, value: float = 1) -> Tensor:
    return _plus(one, two.float() * _single(value), three.double()).to(one.dtype)


def _lerp(start: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return torch.lerp(start, end, weight)
    way, part = end.float() - start.float(), _single(weight)
    if abs(part) < 0.5:
        return _plus(start, way, part).to(start.dtype)
    return _plus(end, way, _single(part - 1)).to(start.dtype)


def _uniform(tensor: Tensor, start: float = 0, stop: float = 1, *, generator: Any = None) -> Tensor:
    start, stop = _single(start), _single(stop)
    unit = torch.rand(tensor.shape, dtype=torch.float32, generator=generator)
    return _plus(torch.full_like(unit, start), unit, _single(stop - start)).to(tensor.dtype)


_ATEN = torch.ops.aten
_ADD = (_ATEN.add, _ATEN.add_)
_FUSED: Mapping[Any, Callable[..., Tensor]] = {
    _ATEN.add: _add,
    _ATEN.add_: _add,
    _ATEN.addcmul: _addcmul,
    _ATEN.addcmul_: _addcmul,
    _ATEN.lerp: _lerp,
    _ATEN.lerp_: _lerp,
    _ATEN.uniform_: _uniform,
}
