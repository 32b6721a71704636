"""What a forward pass takes: the bytes of its live tensors, as a function of its rows.

The pass runs on two rows and on four while every storage that it makes is watched. Each moment of
it is then a line, fixed + rows x per_row, and the peak at any number of rows is the highest of the
lines: exact wherever sizes grow with the rows, and on every device, for two tiny passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fwdlearn.engine.trace import tensors


@dataclass(frozen=True)
class Footprint:
    """The peak of a pass.

    Args:
        lines: (fixed, per_row) in bytes, of the moments that may be the highest; by rising slope.

    Example:
        >>> pass_ = Footprint(((100.0, 1.0), (0.0, 20.0)))
        >>> pass_.bytes(2), pass_.bytes(10), pass_.rows(205)
        (102, 200, 10)
    """

    lines: tuple[tuple[float, float], ...]

    @classmethod
    def highest(cls, several: Iterable[Footprint]) -> Footprint:
        """The peak of whichever pass takes the most."""
        return cls(_highest(line for one in several for line in one.lines))

    def bytes(self, rows: int) -> int:
        """Live at the peak of a pass over `rows`, beside what was there before it."""
        return max([0, *(round(fixed + rows * slope) for fixed, slope in self.lines)])

    def rows(self, budget: int) -> int:
        """The most rows whose peak is within `budget` bytes; 0 where one row is too many."""
        fits = [int((budget - fixed) // slope) for fixed, slope in self.lines if slope > 0]
        if any(fixed > budget for fixed, slope in self.lines if slope <= 0):
            return 0
        return max(0, min(fits, default=2**62))


def footprint(run: Callable[[int], object], device: torch.device) -> Footprint:
    """Measures a pass.

    Args:
        run: runs the pass on that many rows.
        device: where the tensors that count are.
    """
    with _in_parts():
        few, many = (_moments(run, rows, device) for rows in (2, 4))
    if len(few) != len(many):
        # Other operations for other rows: only the peaks can be compared.
        few, many = [max(few)], [max(many)]
    lines = []
    for two, four in zip(few, many, strict=True):
        slope = max(0.0, (four - two) / 2)
        lines.append((four - 4 * slope, slope))
    return Footprint(_highest(lines))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside it and still alive.

    What was there before does not count, nor what a kernel allocates for itself alone.

    Args:
        device: where the storages that count are.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.now = 0
        self.moments = [0]
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._bytes: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To be skipped by the compiler, torch imports it: a second, and 70 MB that stay.
        return False

    @property
    def peak(self) -> int:
        """The most bytes alive at once so far."""
        return max(self.moments)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tensors((args, kwargs)):
            self._see(value, made=False)
        # What a composite operation makes for itself is seen when its parts come through here.
        out = NotImplemented
        if isinstance(func, torch._ops.OpOverload):
            with self:
                out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        for value in tensors(out):
            self._see(value, made=True)
        self.moments.append(self.now)
        return out

    def _see(self, value: Tensor, made: bool) -> None:
        try:
            storage = value.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return
        if storage.device.type != self.device.type:
            return
        key = id(storage)
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key))
            if made:
                self._bytes[key] = 0
        if key in self._bytes:
            # It may have been resized.
            self.now += storage.nbytes() - self._bytes[key]
            self._bytes[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        del self._known[key]
        self.now -= self._bytes.pop(key, 0)


def _moments(run: Callable[[int], object], rows: int, device: torch.device) -> list[int]:
    with LiveBytes(device) as live:
        run(rows)
    return live.moments


@contextmanager
def _in_parts() -> Iterator[None]:
    """Inside, no fused layer of torch hides what it allocates within one operation."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _highest(lines: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Those of the lines that are above all others for some number of rows from 1."""
    kept: list[tuple[float, float]] = []
    for fixed, slope in sorted(lines, key=lambda line: (line[1], line[0])):
        while kept and kept[-1][0] + kept[-1][1] <= fixed + slope:
            kept.pop()
        kept.append((fixed, slope))
    return tuple(kept)
