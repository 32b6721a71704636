"""Tasks that ask for memory: every batch is of sequences that were never seen.

Papers: S. Hochreiter and J. Schmidhuber, "Long short-term memory" (1997), adding problem;
M. Arjovsky, A. Shah and Y. Bengio, "Unitary evolution recurrent neural networks" (arXiv
1511.06464), copying memory and the adding problem in the form here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.data.fresh import Draw, check_counts, fresh_data
from fwdlearn.data.types import Data, DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.objectives import NOT_COUNTED


def delayed_recall(
    steps: int = 40,
    delay: int = 15,
    values: int = 1,
    evaluation_rows: int = 512,
    sequence_seed: int = 0,
) -> Data:
    """Noise to be told again, `delay` steps later.

    Args:
        steps: of a sequence, more than `delay`.
        delay: between input and target, at least 1.
        values: numbers of a step, independent and uniform in [-1, 1).
        evaluation_rows: how many sequences evaluation has, at least 1.
        sequence_seed: of the sequences, so that runs with other seeds share the evaluation rows.

    Returns:
        Inputs and targets float32 [steps, values]. The first `delay` targets are NaN: not counted.

    Raises:
        UsageError: an argument is out of range.
    """
    check_counts("delayed_recall", steps=steps, delay=delay, values=values)
    if delay >= steps:
        raise UsageError(
            f"delayed_recall(delay=...) must be less than steps={steps}, got {delay!r}: the first "
            "target comes when the delay is over."
        )

    def make(draw: Draw) -> tuple[Tensor, Tensor]:
        inputs = (2 * draw(steps * values) - 1).float().unflatten(1, (steps, values))
        targets = F.pad(inputs[:, :-delay], (0, 0, delay, 0), value=torch.nan)
        return inputs, targets

    info = DataInfo("sequence", (steps, values), None, values=values, per_step=True)
    return fresh_data(info, make, evaluation_rows, sequence_seed, "delayed_recall")


def copying_memory(
    length: int = 5,
    delay: int = 10,
    symbols: int = 8,
    evaluation_rows: int = 512,
    sequence_seed: int = 0,
) -> Data:
    """Symbols to be told again in their order, when a mark comes.

    A sequence is `length` symbols, `delay` blanks, a mark and `length` blanks, during which the
    symbols are asked for; nothing else is counted. Chance is 1 / symbols.

    Args:
        length: symbols to remember, at least 1.
        delay: blanks before the mark, at least 1.
        symbols: to choose from, at least 2.
        evaluation_rows: how many sequences evaluation has, at least 1.
        sequence_seed: of the sequences, so that runs with other seeds share the evaluation rows.

    Returns:
        Inputs float32 [2 length + delay + 1, symbols + 2], one-hot: symbols, blank, mark. Targets
        int64 [2 length + delay + 1], -100 where nothing is asked.

    Raises:
        UsageError: an argument is out of range.
    """
    check_counts("copying_memory", length=length, delay=delay)
    if symbols < 2:
        raise UsageError(f"copying_memory(symbols=...) must be at least 2, got {symbols!r}.")
    steps, blank, mark = 2 * length + delay + 1, symbols, symbols + 1

    def make(draw: Draw) -> tuple[Tensor, Tensor]:
        told = (draw(length) * symbols).long()
        seen = torch.full((len(told), steps), blank)
        seen[:, :length], seen[:, length + delay] = told, mark
        targets = torch.full_like(seen, NOT_COUNTED)
        targets[:, -length:] = told
        return F.one_hot(seen, symbols + 2).float(), targets

    info = DataInfo("sequence", (steps, symbols + 2), symbols, per_step=True)
    return fresh_data(info, make, evaluation_rows, sequence_seed, "copying_memory")


def adding_problem(steps: int = 30, evaluation_rows: int = 512, sequence_seed: int = 0) -> Data:
    """Numbers, two of which are marked: their sum is asked at the end.

    One mark lies in the first half, one in the second. The mean of the targets, 1, has a squared
    error of 1/6.

    Args:
        steps: of a sequence, at least 2.
        evaluation_rows: how many sequences evaluation has, at least 1.
        sequence_seed: of the sequences, so that runs with other seeds share the evaluation rows.

    Returns:
        Inputs float32 [steps, 2], a number in [0, 1) and a mark, 0 or 1; targets float32 [1].

    Raises:
        UsageError: an argument is out of range.
    """
    if steps < 2:
        raise UsageError(f"adding_problem(steps=...) must be at least 2, got {steps!r}.")
    half = steps // 2

    def make(draw: Draw) -> tuple[Tensor, Tensor]:
        numbers, places = draw(steps), draw(2)
        first = (places[:, :1] * half).long()
        second = half + (places[:, 1:] * (steps - half)).long()
        marks = torch.zeros_like(numbers).scatter_(1, torch.cat((first, second), 1), 1.0)
        inputs = torch.stack((numbers, marks), 2).float()
        return inputs, (numbers * marks).sum(1, keepdim=True).float()

    info = DataInfo("sequence", (steps, 2), None, values=1)
    return fresh_data(info, make, evaluation_rows, sequence_seed, "adding_problem")
