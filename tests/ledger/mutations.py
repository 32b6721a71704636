"""Files as storage, transport and hands may change them."""

from __future__ import annotations

import random
from collections.abc import Sequence


def mutate(data: bytes, chance: random.Random, cuts: Sequence[int]) -> bytes:
    """`data` with one thing changed.

    Args:
        data: of a file.
        chance: decides what.
        cuts: where its parts begin and end.
    """
    kind = chance.choice(("bit", "byte", "cut", "drop", "insert", "zeros", "part", "again", "swap"))
    size = len(data)
    at = chance.randrange(size)
    length = chance.choice((1, 2, 8, 60, size))
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    if kind == "byte":
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + length :]
    if kind == "insert":
        return data[:at] + chance.randbytes(min(length, 64)) + data[at:]
    if kind == "zeros":
        stop = min(size, at + length)
        return data[:at] + bytes(stop - at) + data[stop:]
    # Whole parts: left out, repeated, or two that change places.
    one, two = sorted(chance.sample(range(len(cuts) - 1), 2))
    first, second = (data[cuts[n] : cuts[n + 1]] for n in (one, two))
    begin, between, rest = data[: cuts[one]], data[cuts[one + 1] : cuts[two]], data[cuts[two + 1] :]
    if kind == "part":
        return begin + between + second + rest
    if kind == "again":
        return begin + first + between + first + rest
    return begin + second + between + first + rest
