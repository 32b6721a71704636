"""Queries as calls of a black box: which rows go into one call, and how many calls run at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine.ladder import Choice
from fwdlearn.engine.measured import Measured
from fwdlearn.engine.params import trainable
from fwdlearn.engine.queries import Queries
from fwdlearn.engine.room import Room
from fwdlearn.engine.sequential import perturbed_copy
from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.keys import Key
from fwdlearn.objectives import per_row

if TYPE_CHECKING:
    from fwdlearn.blackbox import BlackBox


@dataclass(frozen=True)
class _Call:
    """One call of the function: queries at one point.

    Args:
        query: int64 [n], their numbers.
        row: int64 [n], their rows.
        direction: of the point, or None for the unperturbed one.
        scale: of the direction.
    """

    query: Tensor
    row: Tensor
    direction: int | None = None
    scale: float = 0.0

    def __str__(self) -> str:
        more = f" and {len(self.query) - 1} more" if len(self.query) > 1 else ""
        where = f"row {int(self.row[0])}"
        if self.direction is not None:
            where += f", {self.scale:g} along direction {self.direction}"
        return f"query {int(self.query[0])} ({where}){more}"


class Calls:
    """Runs the calls of a black box, as an `Engine` runs the passes of a model.

    Args:
        box: the parameters and the function.
        objective: (output, targets) -> losses [rows].
        rung, memory_budget, compile: of an engine; a black box knows none of them.

    Raises:
        UsageError: nothing is trainable, or something is asked for that only an engine has.
    """

    def __init__(
        self,
        box: BlackBox,
        objective: Callable[[Any, Tensor], Tensor],
        rung: str = "auto",
        memory_budget: int | None = None,
        compile: bool | str = False,
    ) -> None:
        if rung != "auto" or memory_budget is not None or compile:
            raise UsageError(
                "rung, memory_budget and compile are for models that run here, not for a black "
                "box; leave them out."
            )
        self.box, self.objective = box, objective
        self.params: Mapping[str, nn.Parameter] = trainable(box)
        self.choice = Choice("black box", "one call for all rows at one direction and scale")
        self.room = Room()
        self._lock = Lock()

    def choose(self, batch: Batch, dropout: Key | None = None) -> Choice:
        """There is one way only."""
        return self.choice

    def losses(
        self,
        batch: Batch,
        row: Tensor,
        directions: Directions | None = None,
        direction: Tensor | None = None,
        scale: Tensor | float = 0.0,
    ) -> Tensor:
        """Losses [queries]; see `LossOracle.losses`.

        Raises:
            UsageError: the function failed, or did not return one value for each row.
        """
        calls = []
        if directions is None or direction is None:
            every = torch.arange(len(row), device=row.device)
            calls = [_Call(query, row[query]) for query in self._portions(every)]
        else:
            scale = torch.as_tensor(scale, dtype=torch.float64, device=row.device).expand(len(row))
            queries = Queries(batch, row, directions, direction, scale)
            for number, size, mine in queries.points():
                parts = self._portions(mine)
                calls += [_Call(query, row[query], number, size) for query in parts]
        losses = torch.cat(
            [
                per_row(self.objective(output, batch.targets[call.row]), len(call.row))
                for call, output in zip(calls, self._answers(batch, directions, calls), strict=True)
            ]
        )
        order = torch.cat([call.query for call in calls])
        return torch.empty_like(losses).index_copy_(0, order, losses)

    def evaluate(self, batch: Batch) -> tuple[Tensor, object]:
        """Losses [rows], and what the function returned."""
        return self._clean(batch)

    def measure(self, batch: Batch, residual: bool) -> Measured:
        """A clean pass over the batch, in its order."""
        losses, output = self._clean(batch)
        return Measured.of(losses, [(output, batch.targets)]) if residual else Measured(losses)

    def _clean(self, batch: Batch) -> tuple[Tensor, Tensor]:
        every = torch.arange(len(batch), device=batch.device)
        calls = [_Call(query, query) for query in self._portions(every)]
        output = torch.cat(self._answers(batch, None, calls))
        return per_row(self.objective(output, batch.targets), len(batch)), output

    def _portions(self, query: Tensor) -> Sequence[Tensor]:
        return query.split(self.box.rows_per_call or max(1, len(query)))

    def _answers(
        self, batch: Batch, directions: Directions | None, calls: Sequence[_Call]
    ) -> list[Tensor]:
        """What the function returned, in the order of the calls whatever comes first."""

        def answer(call: _Call) -> Tensor:
            # Of this thread; and directions keep numbers that threads must not fight for.
            with torch.inference_mode():
                with self._lock:
                    params = self._perturbed(directions, call)
                return self._ask(params, batch.select(call.row), call)

        if self.box.workers == 1 or len(calls) == 1:
            return [answer(call) for call in calls]
        with ThreadPoolExecutor(min(self.box.workers, len(calls))) as pool:
            return list(pool.map(answer, calls))

    def _perturbed(self, directions: Directions | None, call: _Call) -> dict[str, Tensor]:
        params = {name: value.detach().clone() for name, value in self.box.named_parameters()}
        if directions is None or call.direction is None:
            return params
        return params | perturbed_copy(self.params, directions, call.direction, call.scale)

    def _ask(self, params: Mapping[str, Any], rows: Batch, call: _Call) -> Tensor:
        count, device = len(rows), rows.device
        if self.box.numpy:
            params = {name: _as_array(value) for name, value in params.items()}
            rows = rows.map(_as_array)
        try:
            return _one_a_row(self.box.function(params, rows), count).to(device)
        except FwdlearnError:
            raise
        except Exception as error:  # anyone's function
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"the black box failed at {call}: {reason}") from error


def _as_array(value: Tensor) -> Any:
    return value.cpu().numpy()


def _one_a_row(output: Any, rows: int) -> Tensor:
    """A copy of what the function returned, because functions use their memory again."""
    if isinstance(output, Tensor):
        found = output.detach().clone()
    else:
        array = np.array(output)
        if array.dtype.kind not in "bif":
            raise TypeError(f"it returned {type(output).__name__}, not numbers")
        found = torch.from_numpy(array)
    if not found.dim() or len(found) != rows:
        raise ValueError(
            f"it must return a loss, or an output, for each of {rows} rows, not something of "
            f"shape {tuple(found.shape)}"
        )
    return found
