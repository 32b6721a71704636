"""Rows without end: each is made of its number when it is asked for, and none comes twice.

Row `number` of a task is a pure function of the task's seed and the number. A trainer goes through
numbers that no other step of the run has had, from a place that its own seed decides, so that its
batches are pure functions of (seed, step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.data.types import Data, DataInfo, Rows
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key, stream_id

Draw = Callable[[int], Tensor]
"""count -> float64 [rows, count] in [0, 1), for the rows under way; each call draws anew."""


@dataclass(frozen=True)
class Fresh:
    """A dataset of `LENGTH` rows that are made when they are asked for.

    Args:
        key: of the randomness.
        make: from draws to inputs and targets, each [rows, ...].
    """

    key: Key
    make: Callable[[Draw], tuple[Tensor, Tensor]]

    LENGTH = 2**62
    endless = True

    def __len__(self) -> int:
        return self.LENGTH

    def batch(self, index: Tensor) -> Batch:
        inputs, targets = self.make(_draws(self.key, index))
        return Batch((inputs,), targets)

    def held(self, rows: int) -> Rows:
        """The first rows, made once."""
        inputs, targets = self.make(_draws(self.key, torch.arange(rows)))
        return Rows(inputs, targets)


def fresh_data(
    info: DataInfo,
    make: Callable[[Draw], tuple[Tensor, Tensor]],
    evaluation_rows: int,
    seed: int,
    owner: str,
) -> Data:
    """Training rows without end, and evaluation rows that are none of them.

    Args:
        owner: what the user calls it, for messages.

    Raises:
        UsageError: there are no evaluation rows, or the seed is out of range.
    """
    if evaluation_rows < 1:
        raise UsageError(f"{owner}(evaluation_rows=...) must be at least 1, got {evaluation_rows}.")
    if not 0 <= seed < 2**64:
        raise UsageError(f"{owner}(sequence_seed=...) must lie in [0, 2**64), got {seed}.")
    key = Key.root(seed).fold(owner)
    evaluation = Fresh(key.fold("evaluation"), make).held(evaluation_rows)
    return Data(info, Fresh(key.fold("training"), make), evaluation)


def check_counts(owner: str, **counts: int) -> None:
    """Raises UsageError, naming the argument, unless every count is at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"{owner}({name}=...) must be at least 1, got {value!r}.")


def _draws(key: Key, number: Tensor) -> Draw:
    number, calls = number.to(torch.int64).unsqueeze(1), 0
    low, high = number & 0xFFFFFFFF, number >> 32

    def draw(count: int) -> Tensor:
        nonlocal calls
        # One stream for each call; the other word of its name is the number's upper half.
        stream = (torch.tensor(stream_id(f"draw {calls}")[0]), high)
        calls += 1
        words = key.words(torch.arange(-(-count // 4)), low, stream)
        return words.flatten(1)[:, :count].double() / 2**32

    return draw
