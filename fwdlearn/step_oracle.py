"""The oracle on a model that runs step by step: all that `ModelOracle` answers, and moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.engine.moments import Moment
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.keys import Key
from fwdlearn.noise import Noise, Output
from fwdlearn.oracle import Lazy, ModelOracle, forbid_backward
from fwdlearn.steps import Sequences


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
        noise: Callable[[int], Noise],
        index: Tensor,
        scale: Tensor | float,
        shifts: bool = False,
    ) -> Iterator[Moment]:
        """See `TimeOracle.moments`."""
        scales = torch.as_tensor(scale, dtype=torch.float64, device=row.device).expand(len(row))
        self._queries += self.rows + len(row)
        steps = self._engine.moments.run(self._sequences, row, noise, index, scales, shifts, None)
        while True:
            # Nothing stays forbidden while the caller looks at a step.
            with torch.inference_mode(False), forbid_backward():
                found = next(steps, None)
            if found is None:
                return
            yield found[0]

    def _surveyed(self) -> Mapping[str, Output]:
        with torch.inference_mode(False), forbid_backward():
            return self._engine.moments.outputs(self._sequences)

    @property
    def _sequences(self) -> Sequences:
        return Sequences.of(self._batch, self._engine.objective)
