"""Random numbers by address."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from scipy import stats

from fwdlearn.keys import Key, philox4x32, stream_id

# Random123 1.09, tests/kat_vectors, the three lines "philox4x32 10": counter, key, answer.
KNOWN = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN.split("\n")[1:4])
def test_published_vectors(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    counter = tuple(torch.tensor(word) for word in words[:4])
    answer = philox4x32(counter, (words[4], words[5]))  # type: ignore[arg-type]
    assert [int(word) for word in answer] == words[6:]


def test_published_vectors_all_at_once() -> None:
    words = torch.tensor([[int(w, 16) for w in line.split()] for line in KNOWN.split("\n")[1:4]])
    for row in words:
        counter = words[:, :4].unbind(1)
        answer = torch.stack(philox4x32(counter, (int(row[4]), int(row[5]))), 1)  # type: ignore[arg-type]
        same = (words[:, 4:6] == row[4:6]).all(1)
        assert torch.equal(answer[same], words[same, 6:])


def test_words_do_not_depend_on_what_else_is_asked() -> None:
    key, stream = Key.root(1), tuple(torch.tensor(word) for word in stream_id("w"))
    blocks, directions = torch.arange(50), torch.arange(7).unsqueeze(1)
    whole = key.words(blocks, directions, stream)  # type: ignore[arg-type]
    assert whole.shape == (7, 50, 4) and whole.min() >= 0 and whole.max() < 2**32
    part = key.words(blocks[13:20], directions[[5]], stream)  # type: ignore[arg-type]
    assert torch.equal(part[0], whole[5, 13:20])


def test_uniform() -> None:
    numbers = Key.root(2).uniform(20_000)
    assert numbers.dtype == torch.float64 and numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-6
    assert torch.equal(Key.root(2).uniform(101), numbers[:101])
    assert not torch.equal(Key.root(2).uniform(101, "other"), numbers[:101])
    assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_permutation_is_one(count: int) -> None:
    order = Key.root(3).permutation(count)
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(count))


def test_permutation_is_fair() -> None:
    """All orders of three, 1,200 times: chi-square, false alarm 1e-6."""
    counts: dict[tuple[int, ...], int] = {}
    for number in range(1200):
        order = tuple(Key(number, 77).permutation(3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-6


def test_keys_differ_by_seed_and_by_fold() -> None:
    root = Key.root(0)
    keys = [Key.root(seed) for seed in range(50)] + [Key.root(2**63)]
    keys += [root.fold(step) for step in range(50)] + [root.fold(2**40)]
    keys += [root.fold(str(step)) for step in range(50)]
    keys += [root.fold(1).fold(2), root.fold(2).fold(1)]
    assert len(set(keys)) == len(keys)
    first = [tuple(key.uniform(2).tolist()) for key in keys]
    assert len(set(first)) == len(first)


def test_streams_are_uncorrelated() -> None:
    """Neighbouring keys and steps: correlation of 20,000 numbers, false alarm 1e-6 each."""
    limit = stats.norm.isf(0.5e-6) / math.sqrt(20_000)
    base = Key.root(0).uniform(20_000)
    for other in (Key.root(1), Key.root(0).fold(0), Key.root(0).fold(1), Key(0, 1)):
        both = torch.stack((base, other.uniform(20_000)))
        assert abs(float(torch.corrcoef(both)[0, 1])) < limit


def test_same_in_another_process() -> None:
    code = "from fwdlearn.keys import Key; print(Key.root(9).fold('data').fold(3))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(Key.root(9).fold("data").fold(3))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_have_a_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"Key.root\(seed\) must lie in .* got {seed}\."):
        Key.root(seed)
    with pytest.raises(ValueError, match=rf"Key.fold\(data\) must lie in .* got {seed}\."):
        Key.root(0).fold(seed)
