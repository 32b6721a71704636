from __future__ import annotations

import pytest
import torch

from fwdlearn.moonwalk.bits import Bits


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 4, 8), (0,), (255,)])
def test_round_trip(shape: tuple[int, ...]) -> None:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = Bits.pack(mask)
    assert packed.data.numel() == -(-mask.numel() // 8)
    assert packed.data.untyped_storage().nbytes() == packed.data.numel()
    assert torch.equal(packed.unpack() > 0, mask)


def test_every_byte() -> None:
    numbers = torch.arange(256)
    mask = ((numbers[:, None] >> torch.arange(8)) & 1).bool()
    packed = Bits.pack(mask)
    assert packed.data.tolist() == numbers.tolist()
    assert torch.equal(packed.unpack() > 0, mask)
