"""Exact slopes of a model that runs step by step: tangents that states carry.

The rungs are those of any other model (`fwdlearn.engine.slopes`): `dual`, K directions beside one
pass of plain values, where rows of a pass may have different ones; and `jvp`, torch's own forward
mode, where they may not, so that directions of their own for each row cost a pass for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import jvp

from fwdlearn.directions import Directions
from fwdlearn.engine.choice import Choice
from fwdlearn.engine.dual import Dual, HiddenError
from fwdlearn.engine.dual_rules import DUAL_RULES
from fwdlearn.engine.jvp import along, reason
from fwdlearn.engine.layout import SlopePass, slope_passes
from fwdlearn.engine.queries import Queries, masks
from fwdlearn.engine.slopes import SLOPE_RUNGS, derivable
from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.keys import Key
from fwdlearn.steps import Memory, Sequences, State

if TYPE_CHECKING:
    from fwdlearn.engine.through_time import TimeEngine

# Largest difference from differences of losses, relative to the slopes.
_SLACK = {torch.float64: 1e-4, torch.float32: 5e-2}
# Ends the name of a state's tangents.
_MOVED = "'"


class StepSlopes:
    """Losses and slopes of one model.

    Args:
        engine: runs its passes.

    Attributes:
        rung: in use, once there is one.
    """

    def __init__(self, engine: TimeEngine) -> None:
        self.engine = engine
        self.rung: str | None = None

    @derivable
    def __call__(
        self,
        sequences: Sequences,
        row: Tensor,
        directions: Directions,
        direction: Tensor,
        dropout: Key | None,
        memory: Memory | None,
    ) -> tuple[Tensor, Tensor]:
        """See `TimeEngine.slopes`; sequences may be pieces, of which the memory is."""
        rung = self.rung or self.choose(sequences, dropout)
        return self._at(rung, sequences, row, directions, direction, dropout, memory)

    @derivable
    def choose(self, sequences: Sequences, dropout: Key | None) -> str:
        """Settles on the first rung whose slopes agree with differences of losses.

        Raises:
            UsageError: there is none.
        """
        failed = []
        for rung in SLOPE_RUNGS:
            try:
                why = self._disagrees(rung, sequences.few(), dropout)
            except (FwdlearnError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # anyone's model, run as it was not written to be
                why = reason(error)
                if isinstance(error, HiddenError):
                    failed.append(f"{rung}: {why}")
                    break
            if why is None:
                self._settle(rung, failed)
                return rung
            failed.append(f"{rung}: {why}")
        raise UsageError(
            f"{type(self.engine.model).__name__} gives no exact slopes ({'; '.join(failed)}). "
            "Choose an estimator that needs losses alone (`fwdlearn ls` shows them)."
        )

    def _settle(self, rung: str, failed: list[str]) -> None:
        self.rung, choice = rung, self.engine.choice
        if failed and choice is not None:
            told = f"{choice.reason}; exact slopes by {rung} ({'; '.join(failed)})"
            self.engine.choice = Choice(choice.rung, told)

    def _at(
        self,
        rung: str,
        sequences: Sequences,
        row: Tensor,
        directions: Directions,
        direction: Tensor,
        dropout: Key | None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        engine = self.engine
        losses, slopes = engine.zero(row), engine.zero(row)
        private = rung == "dual"
        for some in slope_passes(row, direction, engine.size(1), private=private):
            carried = None if memory is None else _Moving(memory, some.query)
            run = self._dual if private else self._dense
            total, moved = run(sequences, some, directions, dropout, carried)
            losses[some.query] = total.expand(some.query.shape)
            if moved is not None:
                slopes[some.query] = moved
        return losses, slopes

    def _dual(
        self,
        sequences: Sequences,
        some: SlopePass,
        directions: Directions,
        dropout: Key | None,
        carried: _Moving | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Losses [rows] and slopes [K, rows]."""
        engine = self.engine
        memory = None if carried is None else carried.memory
        uses = engine.unrolled(DUAL_RULES, sequences, dropout, memory)
        dual = Dual(engine.names, uses, DUAL_RULES, directions, some.direction)
        begun = None if carried is None else carried.before()
        with masks(dropout, some.row), dual:
            if begun is not None:
                for name, value in begun.plain.items():
                    dual.carry(value, begun.moved[name])
            total, state = engine.through(sequences, some.row, begun.plain if begun else None)
        dual.finish()
        if carried is not None:
            carried.keep(state, {name: dual.tangent(value) for name, value in state.items()})
        return total, dual.tangent(total)

    def _dense(
        self,
        sequences: Sequences,
        some: SlopePass,
        directions: Directions,
        dropout: Key | None,
        carried: _Moving | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same; all rows share their directions."""
        engine = self.engine
        begun = None if carried is None else carried.before()
        held = {name: value.detach() for name, value in engine.params.items()}
        tangents = [directions.dense(name, some.direction) for name in held]
        moving = {}
        if begun is not None:
            moving = {n: v for n, v in begun.plain.items() if v.is_floating_point()}
            tangents += [begun.moved[name] for name in moving]
        names: list[str] = []

        def run(*values: Tensor) -> tuple[tuple[Tensor, ...], State]:
            weights = dict(zip(held, values, strict=False))
            state = None
            if begun is not None:
                state = begun.plain | dict(zip(moving, values[len(held) :], strict=True))
            with engine.seeing(weights), masks(dropout, some.row):
                total, after = engine.through(sequences, some.row, state)
            names[:] = [n for n, v in after.items() if v.is_floating_point()]
            rest = {n: v for n, v in after.items() if n not in names}
            return (total, *(after[n] for n in names)), rest

        def push(*slopes: Tensor) -> tuple[object, tuple[Tensor, ...]]:
            primals = (*held.values(), *moving.values())
            plain, moved, rest = jvp(run, primals, slopes, has_aux=True)  # type: ignore[misc]
            return (plain, rest), moved

        (plain, rest), moved = along(push, tangents)
        if carried is not None:
            state = dict(zip(names, plain[1:], strict=True)) | rest
            carried.keep(state, dict(zip(names, moved[1:], strict=True)))
        return plain[0], moved[0]

    def _disagrees(self, rung: str, sequences: Sequences, dropout: Key | None) -> str | None:
        """How far slopes are from differences of losses, where that is too far."""
        engine, least = self.engine, float("inf")
        tolerance, probe = engine.allowed(_SLACK), engine.probe(sequences, dropout)
        asked = (probe.row, probe.directions, probe.direction, dropout)
        found = self._at(rung, sequences, *asked)[1].double()
        for size in (1e-3, 1e-4, 1e-2, 1e-5):
            differences = self._differences(sequences, probe, size)
            apart = (found - differences).norm() / differences.norm().clamp(min=1e-300)
            least = min(least, float(apart))
            if least <= tolerance:
                return None
        return (
            f"they differ from differences of losses by {least:.0e} (allowed: {tolerance:.0e}), "
            "so an operation hides its derivative"
        )

    def _differences(self, sequences: Sequences, probe: Queries, size: float) -> Tensor:
        """Slopes [queries] by losses on both sides."""
        asked = (probe.batch, probe.row, probe.directions, probe.direction)
        sides = [
            self.engine.reference(
                sequences, Queries(*asked, probe.scale * size * side, probe.dropout)
            )
            for side in (1, -1)
        ]
        return (sides[0].double() - sides[1].double()) / (2 * size)


@dataclass(frozen=True)
class _Begun:
    """The states of rows, [rows, ...], and K tangents of each, [K, rows, ...]."""

    plain: State
    moved: State


@dataclass(frozen=True)
class _Moving:
    """The memory of a pass with tangents.

    Args:
        memory: of all queries; each has the state of its row, and a tangent.
        query: int64 [K, rows].
    """

    memory: Memory
    query: Tensor

    def before(self) -> _Begun | None:
        """What a pass begins with; None at the beginning of sequences."""
        # Of a row, any of its queries tells.
        plain, moved = self.memory.at(self.query[0]), self.memory.at(self.query.flatten())
        if plain is None or moved is None:
            return None
        state = {name: value for name, value in plain.items() if not name.endswith(_MOVED)}
        tangents = {
            name: moved[name + _MOVED].view(*self.query.shape, *value.shape[1:])
            for name, value in state.items()
        }
        return _Begun(state, tangents)

    def keep(self, state: State, tangents: Mapping[str, Tensor | None]) -> None:
        """Takes what a pass ends with; a tangent that is not there is zero."""
        flat: State = {}
        for name, value in state.items():
            whole, moved = value.expand(len(self.query), *value.shape), tangents.get(name)
            flat[name] = whole.flatten(0, 1)
            flat[name + _MOVED] = (torch.zeros_like(whole) if moved is None else moved).flatten(
                0, 1
            )
        self.memory.keep(self.query.flatten(), flat)
