"""Eight booleans in a byte: what a leaky ReLU leaves behind is one bit a unit."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# One multiplication gathers the lowest bits of eight bytes in the highest byte, or spreads a byte
# over eight; int64 wraps around.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_SELECT = 0x8040201008040201 - (1 << 64)


class Bits(NamedTuple):
    """A packed mask.

    Args:
        data: uint8 [ceil(size / 8)].
        shape: of the mask.
    """

    data: Tensor
    shape: torch.Size

    @classmethod
    def pack(cls, mask: Tensor) -> Bits:
        """bool [*shape] -> one bit each."""
        flat = mask.flatten().view(torch.uint8)
        if rest := -flat.numel() % 8:
            flat = F.pad(flat, (0, rest))
        highest = (flat.view(torch.int64) * _GATHER).view(torch.uint8)[7::8]
        return cls(highest.clone(memory_format=torch.contiguous_format), mask.shape)

    def unpack(self) -> Tensor:
        """uint8 [*shape]: above zero where the mask is set."""
        spread = self.data.long().mul_(_SPREAD).bitwise_and_(_SELECT).view(torch.uint8)
        return spread[: self.shape.numel()].view(self.shape)
