"""Oracles over plain functions: they count, and remember what they were asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fwdlearn.directions import Directions
from fwdlearn.engine.shifts import Shift
from fwdlearn.errors import UsageError
from fwdlearn.noise import Noise, Output
from fwdlearn.oracle import CleanPass
from fwdlearn.testing.problems import Problem

RowFunction = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Asked:
    """One block of queries.

    Args:
        row: int64 [queries].
        directions: the family of directions or the noise, or None for the unperturbed point.
        direction: int64 [queries], or None.
        scale: float64 [queries]; 0 where slopes were asked for.
    """

    row: Tensor
    directions: Directions | Noise | None
    direction: Tensor | None
    scale: Tensor


class FunctionOracle:
    """A LossOracle over any per-row function.

    Args:
        function: (name -> [queries, *shape], row int64 [queries]) -> losses [queries].
        params: name -> tensor. They are read at every question, so that whoever writes on them
            changes the answers.
        rows: rows of the batch.
        alter: sees each block and its answers ([queries] losses or slopes) and returns the
            answers to give; raises to make the oracle fail.

    Attributes:
        asked: every block, in order.

    Example:
        >>> params = {"w": torch.ones(2, dtype=torch.float64)}
        >>> oracle = FunctionOracle(lambda values, row: values["w"].sum(1) + row, params, rows=3)
        >>> oracle.losses(torch.tensor([0, 2])).tolist(), oracle.queries
        ([2.0, 4.0], 2)
    """

    def __init__(
        self,
        function: RowFunction,
        params: Mapping[str, Tensor],
        rows: int,
        *,
        alter: Callable[[Asked, Tensor], Tensor] | None = None,
    ) -> None:
        self.params, self.rows, self.queries = params, rows, 0
        self.asked: list[Asked] = []
        self._function, self._alter = function, alter

    def losses(
        self,
        row: Tensor,
        directions: Directions | None = None,
        direction: Tensor | None = None,
        scale: Tensor | float = 0.0,
    ) -> Tensor:
        scales = torch.as_tensor(scale, dtype=torch.float64).expand(len(row))
        asked = self._record(row, directions, direction, scales)
        values = {}
        for name, value in self.params.items():
            values[name] = value.expand(len(row), *value.shape)
            if directions is not None and direction is not None and name in directions.params:
                step = scales.to(value.dtype).reshape(-1, *[1] * value.dim())
                values[name] = values[name] + step * directions.dense(name, direction)
        return self._answer(asked, self._function(values, row))

    def _record(
        self,
        row: Tensor,
        directions: Directions | Noise | None,
        direction: Tensor | None,
        scale: Tensor,
    ) -> Asked:
        if (directions is None) != (direction is None):
            raise UsageError("losses() needs both a family of directions and their numbers.")
        if row.dtype != torch.int64 or row.dim() != 1:
            raise UsageError(f"row must be int64 [queries], got {row.dtype} {tuple(row.shape)}.")
        if direction is not None and direction.shape != row.shape:
            raise UsageError(
                f"direction must have one entry a query, got {tuple(direction.shape)} for "
                f"{len(row)} queries."
            )
        asked = Asked(row, directions, direction, scale)
        self.asked.append(asked)
        self.queries += len(row)
        return asked

    def _answer(self, asked: Asked, answer: Tensor) -> Tensor:
        double = any(value.dtype == torch.float64 for value in self.params.values())
        answer = answer.to(torch.float64 if double else torch.float32)
        return answer if self._alter is None else self._alter(asked, answer)


class SlopeFunctionOracle(FunctionOracle):
    """A SlopeOracle over any per-row function that forward-mode derivatives can pass."""

    def slopes(
        self, row: Tensor, directions: Directions, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        asked = self._record(row, directions, direction, torch.zeros(len(row)).double())
        # Forward mode wants memory of its own for every entry.
        values = {n: v.repeat(len(row), *[1] * v.dim()) for n, v in self.params.items()}
        tangents = {name: directions.dense(name, direction) for name in self.params}
        answers = torch.func.jvp(lambda v: self._function(v, row), (values,), (tangents,))
        return self._answer(asked, answers[0]), self._answer(asked, answers[1])


@dataclass(frozen=True)
class FunctionCleanPass:
    """A clean pass over a plain function."""

    losses: Tensor
    rms: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    exact: Mapping[str, Tensor] = field(default_factory=dict)

    def gather(self, cotangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: cotangents[name].sum(0) for name in cotangents}


class ActivationFunctionOracle(FunctionOracle):
    """An ActivationOracle over any per-row function: each parameter is a layer and its output.

    The layer puts out the parameter itself, for every row anew. Noise in its output is then noise
    in the parameter of that row, the cotangent of the output is the row's gradient, and whatever
    is known of a problem is known of its layers.
    """

    @property
    def sites(self) -> Mapping[str, Output]:
        return {n: Output(tuple(v.shape), v.dtype, (n,)) for n, v in self.params.items()}

    @property
    def left_out(self) -> Mapping[str, str]:
        return {}

    def noisy_losses(
        self, row: Tensor, noise: Noise, index: Tensor, scale: Tensor | float
    ) -> Tensor:
        return self._noisy(row, noise, index, scale)[0]

    def _noisy(
        self, row: Tensor, noise: Noise, index: Tensor, scale: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses, and what every layer put out."""
        scales = torch.as_tensor(scale, dtype=torch.float64).expand(len(row))
        asked = self._record(row, noise, index, scales)
        values = {n: v.detach().repeat(len(row), *[1] * v.dim()) for n, v in self.params.items()}
        for name in noise.names:
            noise.add(values[name], name, index, scales)
        return self._answer(asked, self._function(values, row)), values

    def noisy_slopes(self, row: Tensor, noise: Noise, index: Tensor) -> tuple[Tensor, Tensor]:
        asked = self._record(row, noise, index, torch.zeros(len(row)).double())
        values = {n: v.detach().repeat(len(row), *[1] * v.dim()) for n, v in self.params.items()}
        tangents = {name: torch.zeros_like(value) for name, value in values.items()}
        tangents |= {name: noise.dense(name, index).to(values[name]) for name in noise.names}
        answers = torch.func.jvp(lambda v: self._function(v, row), (values,), (tangents,))
        return self._answer(asked, answers[0]), self._answer(asked, answers[1])

    def noisy_shifts(
        self, clean: CleanPass, row: Tensor, noise: Noise, index: Tensor, scale: Tensor | float
    ) -> Iterator[Shift]:
        # In two blocks, so that an estimator that forgets one is seen.
        scales = torch.as_tensor(scale, dtype=torch.float64).expand(len(row))
        for some in (slice(0, 5), slice(5, len(row))):
            if not len(row[some]):
                continue
            losses, values = self._noisy(row[some], noise, index[some], scales[some])
            outputs = {name: v - clean.outputs[name][row[some]] for name, v in values.items()}
            yield Shift(some, losses, outputs)

    def clean(self, outputs: bool = False) -> FunctionCleanPass:
        rms = {name: value.square().mean().sqrt() for name, value in self.params.items()}
        kept = {n: v.detach().expand(self.rows, *v.shape) for n, v in self.params.items()}
        losses = self.losses(torch.arange(self.rows))
        return FunctionCleanPass(losses, rms, kept if outputs else {})

    def gather(self, cotangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.clean().gather(cotangents)


@dataclass(frozen=True)
class FunctionMoment:
    """The only step of a plain function."""

    clean: Tensor
    losses: Tensor
    shifts: Mapping[str, Tensor]
    step: int = 0
    exact: Mapping[str, Tensor] = field(default_factory=dict)

    def gather(self, cotangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: cotangents[name].sum(0) for name in cotangents}


class TimeFunctionOracle(ActivationFunctionOracle):
    """A TimeOracle over any per-row function: a sequence of one step, otherwise as its base."""

    def length(self) -> int:
        return 1

    @property
    def step_sites(self) -> Mapping[str, Output]:
        return self.sites

    @property
    def step_left_out(self) -> Mapping[str, str]:
        return {}

    def step_head(self) -> str | None:
        return None

    def moments(
        self,
        row: Tensor,
        noise: Callable[[int], Noise | Directions],
        index: Tensor,
        scale: Tensor | float,
        shifts: bool = False,
    ) -> Iterator[FunctionMoment]:
        clean = self.losses(torch.arange(self.rows))
        losses, moved = clean[:0], dict[str, Tensor]()
        if len(row):
            current = noise(0)
            if isinstance(current, Directions):
                yield FunctionMoment(clean, self.losses(row, current, index, scale), moved)
                return
            losses, values = self._noisy(row, current, index, scale)
            if shifts:
                moved = {name: value - self.params[name] for name, value in values.items()}
        yield FunctionMoment(clean, losses, moved)


def loss_oracle(problem: Problem) -> FunctionOracle:
    """A LossOracle over a problem, on its own copy of the parameters."""
    return FunctionOracle(problem.losses, _copy(problem), problem.rows)


def slope_oracle(problem: Problem) -> SlopeFunctionOracle:
    """A SlopeOracle over a problem, on its own copy of the parameters."""
    return SlopeFunctionOracle(problem.losses, _copy(problem), problem.rows)


def activation_oracle(problem: Problem) -> ActivationFunctionOracle:
    """An ActivationOracle over a problem, on its own copy of the parameters."""
    return ActivationFunctionOracle(problem.losses, _copy(problem), problem.rows)


def time_oracle(problem: Problem) -> TimeFunctionOracle:
    """A TimeOracle over a problem, on its own copy of the parameters."""
    return TimeFunctionOracle(problem.losses, _copy(problem), problem.rows)


def _copy(problem: Problem) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in problem.params.items()}
