"""Peak of live tensor bytes: every storage that an operation makes, until it is freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what is made inside the block, backward passes included. What was there before
    (weights, inputs) counts nothing, and scratch memory within one kernel is not seen.

    Attributes:
        now: bytes alive.
        peak: the most there were.

    Example:
        >>> with LiveBytes() as live:
        ...     kept = torch.zeros(256)
        ...     _ = kept + 1
        >>> live.peak
        2048
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._watch(storage, 0)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._watch(storage, storage.nbytes())
        return out

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        # The same object as long as the memory lives, so its number names the memory.
        if id(storage) not in self._alive:
            self._alive.add(id(storage))
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, id(storage), size)

    def _free(self, number: int, size: int) -> None:
        self._alive.discard(number)
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in tree_leaves(values) if isinstance(v, Tensor)]
