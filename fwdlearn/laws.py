"""The laws of random directions: how random words become numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

# Bytes of numbers expanded at once on a GPU, where every operation that is started costs as much as
# a sweep over these.
EXPAND_BYTES_GPU = 512 * 2**20
# What three passes over the same numbers find again in a cache.
_CACHE_BYTES = 2**20


class Law(ABC):
    """How random words become numbers of mean 0 and variance 1.

    `raw` is the compact form that is kept, `expand` makes floating-point numbers of it.
    """

    name: ClassVar[str]
    numbers_per_block: ClassVar[int]
    raw_bytes_per_block: ClassVar[int]
    # Whether bfloat16 holds every number exactly.
    short: ClassVar[bool] = False

    @abstractmethod
    def raw(self, words: Tensor) -> Tensor:
        """int64 [..., 4] -> the kept form [..., 4], four bytes each."""

    @abstractmethod
    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The kept form [count, blocks, 4] -> [count, blocks * numbers_per_block] of `dtype`."""

    @abstractmethod
    def pick(self, raw: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers at int64 `index` [count, k] of what `expand` would give: [count, k]."""


class Rademacher(Law):
    """+1 or -1 with equal probability: one bit a number, the same on every machine."""

    name = "rademacher"
    numbers_per_block = 128
    raw_bytes_per_block = 16
    short = True

    def raw(self, words: Tensor) -> Tensor:
        return words.to(torch.int32)

    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        count, words = len(raw), raw.flatten(1)
        # The bit moves to the sign of a one that is written as an integer of the same width.
        short = dtype in _SHORT_ONES
        size, ones = (torch.int16, _SHORT_ONES[dtype]) if short else (torch.int32, 0x3F800000)
        words = words.contiguous().view(size)
        width = 8 * size.itemsize
        shifts = torch.arange(width - 1, -1, -1, dtype=size, device=raw.device)
        sign = -(1 << (width - 1))
        out = torch.empty(count, words.shape[1], width, dtype=size, device=raw.device)
        cache = _CACHE_BYTES if raw.device.type == "cpu" else EXPAND_BYTES_GPU
        step = max(1, cache // max(1, out[:1].numel() * size.itemsize))
        for start in range(0, count, step):
            part = out[start : start + step]
            torch.bitwise_left_shift(words[start : start + step, :, None], shifts, out=part)
            # A set bit is +1.
            part.bitwise_and_(sign).bitwise_xor_(sign | ones)
        return out.view(dtype if short else torch.float32).flatten(1).to(dtype)

    def pick(self, raw: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        words = raw.flatten(1).gather(1, index >> 5)
        return (((words >> (index & 31)) & 1) * 2 - 1).to(dtype)


class Gaussian(Law):
    """Standard normal by Box-Muller: exact per backend, equal to rounding between backends."""

    name = "gaussian"
    numbers_per_block = 4
    raw_bytes_per_block = 16

    def raw(self, words: Tensor) -> Tensor:
        # Half a step off the grid keeps the logarithm finite.
        uniform = (words.double() + 0.5) / 2**32
        radius = torch.sqrt(-2 * torch.log(uniform[..., 0::2]))
        angle = 2 * math.pi * uniform[..., 1::2]
        pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
        return pair.flatten(-2).float()

    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        return raw.flatten(1).to(dtype)

    def pick(self, raw: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        return raw.flatten(1).gather(1, index).to(dtype)


LAWS: Mapping[str, Law] = {law.name: law for law in (Rademacher(), Gaussian())}

# 1.0 as the integer that a short dtype stores.
_SHORT_ONES = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}


def check_law(owner: str, law: str, rank: int | None) -> None:
    """Raises ValueError, naming `owner`, unless `law` and `rank` describe directions."""
    if law not in LAWS:
        raise ValueError(f"{owner}(law=...) must be one of {', '.join(LAWS)}, got {law!r}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"{owner}(rank=...) must be a positive integer, or None for independent entries, "
            f"got {rank!r}."
        )
