"""The oracle on a model that runs step by step: all that `ModelOracle` answers, and moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine.moments import Moment
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import Noise, Output
from fwdlearn.oracle import Lazy, ModelOracle, forbid_backward
from fwdlearn.steps import Carried, Memory, Sequences


class StepOracle(ModelOracle):
    """Every kind of oracle on a model that runs step by step, and a batch of sequences.

    Losses and slopes take memory for one step. Noise anywhere in the sequence (`noisy_losses`,
    `clean`) takes memory for all of them; noise by `moments` does not.

    Args:
        engine: runs the passes; shared by the oracles of a run.
        batch: one input [rows, steps, ...], and targets.
        dropout: names the dropout masks of the batch, for a model in training mode.
    """

    _engine: TimeEngine  # type: ignore[assignment]

    def __init__(self, engine: TimeEngine, batch: Batch, dropout: Key | None = None) -> None:
        super().__init__(engine, batch, dropout)  # type: ignore[arg-type]
        self._before: Carried | None = None
        self._asked: list[Memory] = []

    def _read(self) -> Mapping[str, Tensor]:
        # Steps of later pieces may look other entries up.
        return {}

    def go_on(self, before: Carried) -> None:
        """Makes the batch a piece of its sequences.

        The first question goes on where the first of the piece before went, the second where its
        second went, and so on. One with other queries than that raises UsageError.

        Args:
            before: from `carried`, or without steps at the beginning of the sequences.
        """
        self._before = before

    @property
    def carried(self) -> Carried:
        """What the next piece goes on with."""
        questions = [memory.after for memory in self._asked]
        return Carried(questions, self._steps_before + self.length())

    def length(self) -> int:
        """See `TimeOracle.length`."""
        return self._sequences.steps

    @property
    def step_sites(self) -> Mapping[str, Output]:
        """See `TimeOracle.step_sites`."""
        return Lazy(self._surveyed)

    @property
    def step_left_out(self) -> Mapping[str, str]:
        """See `TimeOracle.step_left_out`."""

        def made() -> Mapping[str, str]:
            self._surveyed()
            return self._engine.moments.left_out

        return Lazy(made)

    def step_head(self) -> str | None:
        """See `TimeOracle.step_head`."""
        self._surveyed()
        return self._engine.moments.head

    def moments(
        self,
        row: Tensor,
        noise: Callable[[int], Noise | Directions],
        index: Tensor,
        scale: Tensor | float,
        shifts: bool = False,
    ) -> Iterator[Moment]:
        """See `TimeOracle.moments`."""
        scales = torch.as_tensor(scale, dtype=torch.float64, device=row.device).expand(len(row))
        self._queries += self.rows + len(row)
        memory, every = self._memory(self.rows), torch.arange(self.rows, device=row.device)
        begun = None if memory is None else memory.at(every)
        steps = self._engine.moments.run(
            self._sequences, row, noise, index, scales, shifts, begun, self._steps_before
        )
        while True:
            # Nothing stays forbidden while the caller looks at a step.
            with torch.inference_mode(False), forbid_backward(), self._home.passing():
                found = next(steps, None)
            if found is None:
                return
            moment, state = found
            if memory is not None:
                memory.keep(every, state)
            yield moment

    @property
    def _steps_before(self) -> int:
        return 0 if self._before is None else self._before.steps

    def _beside(self, queries: int) -> dict[str, Any]:
        return {"memory": self._memory(queries)}

    def _memory(self, queries: int) -> Memory | None:
        """Of the next question, in a piece of sequences."""
        if self._before is None:
            return None
        number, state = len(self._asked), None
        if self._before.steps:
            known = self._before.questions
            state = known[number] if number < len(known) else {}
            if any(len(value) != queries for value in state.values()) or not state:
                raise UsageError(
                    f"sequences in pieces need the same questions of every piece, but question "
                    f"{number + 1} has other queries than it had in the piece before; choose an "
                    "allocator that gives each step the same directions, such as Uniform."
                )
        memory = Memory(state, queries)
        self._asked.append(memory)
        return memory

    def _surveyed(self) -> Mapping[str, Output]:
        with torch.inference_mode(False), forbid_backward(), self._home.passing():
            return self._engine.moments.outputs(self._sequences)

    @property
    def _sequences(self) -> Sequences:
        return Sequences.of(self._batch, self._engine.objective)
