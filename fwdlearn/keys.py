"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).

A number is a pure function of a key and a counter. It does not depend on shapes, chunking, device,
thread count or on what was drawn before, and the global generators are never touched.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Counter words 2 and 3 name a stream; folding uses one that no name can hash to by accident.
_FOLD_STREAM = (0xF01D, 0xFFFFFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on 32-bit words held in int64 tensors.

    Args:
        counter: four int64 tensors of broadcastable shapes, values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    # Words 0 and 2 are multiplied, 1 and 3 are not: held in pairs, a round is seven operations.
    even, odd = torch.stack((c0, c2)), torch.stack((c3, c1))
    column = (2, *[1] * c0.dim())
    multipliers = torch.tensor(_MULTIPLIERS, device=even.device).view(column)
    keys = torch.tensor(_round_keys(*key), device=even.device).view(10, *column)
    product, high = torch.empty_like(even), torch.empty_like(even)
    for number in range(10):
        torch.mul(even, multipliers, out=product)
        # The product wraps modulo 2**64; an arithmetic shift and the mask give its high word.
        torch.bitwise_right_shift(product, 32, out=high).bitwise_and_(_MASK)
        torch.bitwise_xor(high[1], odd[1], out=even[0])
        torch.bitwise_xor(high[0], odd[0], out=even[1])
        even.bitwise_xor_(keys[number])
        torch.bitwise_and(product, _MASK, out=odd)
    return even[0], odd[1], even[1], odd[0]


def _round_keys(k0: int, k1: int) -> list[tuple[int, int]]:
    rounds = []
    for _ in range(10):
        rounds.append((k0, k1))
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return rounds


def _single(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int]:
    """The first two words of one block, in plain integers: a key needs no tensors."""
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(*key):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
    return c0, c1


def stream_id(name: str) -> tuple[int, int]:
    """Two 32-bit words that name a stream, the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@dataclass(frozen=True)
class Key:
    """A 64-bit key. `Key.root(seed).fold(step)` names all the randomness of a step.

    Example:
        >>> Key.root(0).fold(3) == Key.root(0).fold(3)
        True
        >>> Key.root(0).fold(3) == Key.root(0).fold(4)
        False
    """

    low: int
    high: int

    @classmethod
    def root(cls, seed: int) -> Key:
        """The key of a run. `seed` is an integer in [0, 2**64)."""
        if not 0 <= seed < 2**64:
            raise ValueError(f"Key.root(seed) must lie in [0, 2**64), got {seed!r}.")
        return cls(seed & _MASK, seed >> 32)

    def fold(self, data: int | str) -> Key:
        """A new key, independent of this one and of the keys folded with other data."""
        if isinstance(data, str):
            words = stream_id(data)
            stream = (_FOLD_STREAM[0] + 1, _FOLD_STREAM[1])
        else:
            if not 0 <= data < 2**64:
                raise ValueError(f"Key.fold(data) must lie in [0, 2**64), got {data!r}.")
            words, stream = (data & _MASK, data >> 32), _FOLD_STREAM
        return Key(*_single((*words, *stream), (self.low, self.high)))

    def words(self, block: Tensor, direction: Tensor, stream: tuple[Tensor, Tensor]) -> Tensor:
        """Random words by address.

        Args:
            block: int64, which block of 128 bits of the stream.
            direction: int64, the number of the direction.
            stream: two int64 tensors from `stream_id`; all four broadcast together.

        Returns:
            int64 [..., 4] of values in [0, 2**32).
        """
        out = philox4x32((block, direction, *stream), (self.low, self.high))
        return torch.stack(torch.broadcast_tensors(*out), dim=-1)

    def uniform(self, count: int, stream: str = "uniform") -> Tensor:
        """float64 [count] in [0, 1), with 53 random bits each, on the CPU."""
        words = self._stream(stream, -(-count // 2)).view(-1, 2)[:count]
        return ((words[:, 0] >> 5) * 2**26 + (words[:, 1] >> 6)).double() / 2**53

    def permutation(self, count: int) -> Tensor:
        """int64 [count]: a random order of 0, ..., count - 1, on the CPU."""
        words = self._stream("permutation", -(-count // 2)).view(-1, 2)[:count]
        return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)

    def _stream(self, name: str, blocks: int) -> Tensor:
        low, high = (torch.tensor(word) for word in stream_id(name))
        return self.words(torch.arange(blocks), torch.tensor(0), (low, high))
