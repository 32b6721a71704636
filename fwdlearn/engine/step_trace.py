"""What a sequence uses of the parameters, of which one step's is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch

from fwdlearn.engine.queries import masks
from fwdlearn.engine.trace import Recorder, TraceError, Use, compare
from fwdlearn.keys import Key
from fwdlearn.steps import Sequences

Traced = tuple[Sequence[Use], Sequence[Use], Sequence[Use]]
"""What the initial state, the first step and each of the others use."""


class Unrolled(Sequence[Use]):
    """The uses of parameters in a sequence, of which one step's are written down.

    Args:
        head: what the initial state uses.
        first: what the first step uses.
        rest: what each of the others uses.
        steps: how many there are.
    """

    def __init__(
        self, head: Sequence[Use], first: Sequence[Use], rest: Sequence[Use], steps: int
    ) -> None:
        self.head, self.first, self.rest, self.steps = head, first, rest, steps

    def __len__(self) -> int:
        return len(self.head) + len(self.first) + (self.steps - 1) * len(self.rest)

    @overload
    def __getitem__(self, number: int) -> Use: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Use]: ...
    def __getitem__(self, number: int | slice) -> Use | Sequence[Use]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        for part in (self.head, self.first):
            if number < len(part):
                return part[number]
            number -= len(part)
        return self.rest[number % len(self.rest)]


def traced(
    model: Any, names: Mapping[int, str], rules: Any, sequences: Sequences, dropout: Key | None
) -> tuple[Traced, int]:
    """The uses of a model that runs step by step, and its widest activation, in bytes a row.

    Args:
        names: id of a parameter -> its name.
        rules: functions that are known as a whole.

    Raises:
        TraceError: the operations depend on how many rows there are.
    """
    recorders, counts = [], []
    for rows in (2, 3):
        row = torch.arange(rows, device=sequences.inputs.device) % sequences.rows
        recorder, marks = Recorder(names, rules), []
        with masks(dropout, row), recorder:
            state = model.initial(rows)
            marks.append(len(recorder.seen))
            # A state that is no parameter's depends on the rows from the first step on.
            recorder.start([s for s in state.values() if not recorder.is_made(s)])
            for step in range(2):
                x = sequences.input(step % sequences.steps, row)
                recorder.start(x)
                _, state = model.step(x, state)
                marks.append(len(recorder.seen))
        recorders.append(recorder)
        counts.append(marks)
    uses = compare(*recorders)
    if counts[0] != counts[1]:
        raise TraceError("the operations depend on how many rows there are")
    head, first, rest = counts[0]
    return (uses[:head], uses[head:first], uses[first:rest]), -(-recorders[1].widest // 3)
