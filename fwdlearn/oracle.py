"""What an estimator may ask, and the rules of asking.

A query is one forward pass of one row at one perturbed point. Queries come in blocks: query j is
row `row[j]` at `params + scale[j] * E[direction[j]]`, where E is a family of directions. What is
counted is `Batch.passes` for each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NoReturn, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions, ReadParams
from fwdlearn.engine import Engine
from fwdlearn.engine.measured import Measured
from fwdlearn.engine.offload import home_of, on_device
from fwdlearn.engine.shifts import Shift
from fwdlearn.errors import BackwardError, UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import Noise, Output


@runtime_checkable
class LossOracle(Protocol):
    """Answers with losses: all that zeroth-order estimators need."""

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Name -> trainable tensor, read only.

        With weights that are offloaded, their shapes, dtypes and device alone: values are not
        numbers.
        """

    @property
    def rows(self) -> int:
        """Rows of the batch."""

    @property
    def queries(self) -> int:
        """Queries answered so far."""

    def losses(
        self,
        row: Tensor,
        directions: Directions | None = None,
        direction: Tensor | None = None,
        scale: Tensor | float = 0.0,
    ) -> Tensor:
        """Losses of a block of queries.

        Args:
            row: int64 [queries], may repeat.
            directions: the family, or None for the unperturbed point.
            direction: int64 [queries], numbers within the family.
            scale: float, or [queries].

        Returns:
            [queries], float64 if the parameters are, else float32.
        """


@runtime_checkable
class SlopeOracle(LossOracle, Protocol):
    """Answers with exact directional derivatives too."""

    def slopes(
        self, row: Tensor, directions: Directions, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses [queries] and their derivatives [queries] along the directions, at scale 0.

        A slope and its loss count as one query.
        """


class CleanPass(Protocol):
    """A clean pass over the batch that has kept the inputs of layers."""

    @property
    def losses(self) -> Tensor:
        """[rows]."""

    @property
    def rms(self) -> Mapping[str, Tensor]:
        """Name of a layer -> scalar, the root of the mean square of its output."""

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """Name of a layer -> [rows, *shape], what it put out; empty unless it was to be kept."""

    @property
    def exact(self) -> Mapping[str, Tensor]:
        """Name of the layer that puts out what the model does -> derivative of its row's loss.

        [rows, *shape], by forward mode, one derivative for each number of a row. Empty where the
        model's output is no layer's, has more than 4096 numbers a row, or has no slope anywhere.
        """

    def gather(self, cotangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As `ActivationOracle.gather`, without another pass."""


@runtime_checkable
class ActivationOracle(LossOracle, Protocol):
    """Adds noise where layers put out their results, and takes gradients from there.

    A layer's output is named by the parameter that is used there, `name#1` and so on where one is
    used again.
    """

    @property
    def sites(self) -> Mapping[str, Output]:
        """Name of a layer -> what a row of this batch puts out there."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Name of a parameter -> why a part of its gradient cannot be had from any layer."""

    def noisy_losses(
        self, row: Tensor, noise: Noise, index: Tensor, scale: Tensor | float
    ) -> Tensor:
        """Losses of a block of queries with noise in the layers that it names.

        Args:
            row: int64 [queries], may repeat.
            noise: `SiteNoise` for `sites`, or `GivenNoise`.
            index: int64 [queries], numbers within the noise.
            scale: float, or [queries]; its sign makes antithetic pairs.

        Returns:
            [queries], float64 if the parameters are, else float32.
        """

    def noisy_slopes(self, row: Tensor, noise: Noise, index: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [queries] and their derivatives [queries] by the scale of the noise, at scale 0.

        A slope and its loss count as one query.
        """

    def noisy_shifts(
        self, clean: CleanPass, row: Tensor, noise: Noise, index: Tensor, scale: Tensor | float
    ) -> Iterator[Shift]:
        """As `noisy_losses`, with what has changed at every layer: noise and its consequences.

        Comes in blocks, in order, each of which takes as much memory as fits.

        Args:
            clean: from `clean(outputs=True)`.
        """

    def clean(self, outputs: bool = False) -> CleanPass:
        """A clean pass; costs as many queries as there are rows, and memory for all inputs.

        Args:
            outputs: keep what layers put out too, for `noisy_shifts`.
        """

    def gather(self, cotangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradients of parameters, by products with the clean inputs of their own layers.

        Runs a clean pass and keeps one layer's input at a time; costs as many queries as there
        are rows.

        Args:
            cotangents: name of a layer -> [rows, *shape], such as a `NoiseSum`, which is formed
                one layer at a time; or a ChainMap of such.

        Returns:
            Name -> gradient of a parameter, float32 or wider; those that the layers feed.
        """


class Moment(Protocol):
    """One step of a batch of sequences."""

    @property
    def step(self) -> int:
        """Its number, from 0."""

    @property
    def clean(self) -> Tensor:
        """[rows]: what the step adds to the clean losses."""

    @property
    def losses(self) -> Tensor:
        """[queries]: what it adds to the losses under noise of this step and of those before."""

    @property
    def shifts(self) -> Mapping[str, Tensor]:
        """Name of a layer -> [queries, *shape], what noise has changed; empty unless asked for."""

    @property
    def exact(self) -> Mapping[str, Tensor]:
        """`TimeOracle.step_head`, if any -> derivative of the step's losses, [rows, *shape].

        By forward mode, one derivative for each number of a row.
        """

    def gather(self, cotangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradients of parameters by products with the clean inputs of this step's layers.

        Args:
            cotangents: name of a layer -> [rows, *shape], or a ChainMap of such.
        """


@runtime_checkable
class TimeOracle(LossOracle, Protocol):
    """Runs sequences step by step, with noise where layers put out their results."""

    def length(self) -> int:
        """Steps of the batch's sequences."""

    @property
    def step_sites(self) -> Mapping[str, Output]:
        """Name of a layer -> what a row puts out there at a step."""

    @property
    def step_left_out(self) -> Mapping[str, str]:
        """Name of a parameter -> why a part of its gradient cannot be had from any layer."""

    def step_head(self) -> str | None:
        """The layer whose output is what a step puts out, if the loss has a derivative there.

        None where it is no layer's, or where the next state depends on it.
        """

    def moments(
        self,
        row: Tensor,
        noise: Callable[[int], Noise | Directions],
        index: Tensor,
        scale: Tensor | float,
        shifts: bool = False,
    ) -> Iterator[Moment]:
        """The steps, of a clean pass over the rows and of queries with noise.

        Each costs what a whole pass over its sequence does: all together as many queries as there
        are rows and as are asked for. Memory is that of one step.

        Args:
            row: int64 [queries], may repeat; none for a clean pass alone.
            noise: number of a step -> the noise of that step, for `step_sites`; or directions,
                along which the weights are perturbed at that step alone.
            index: int64 [queries], numbers within the noise.
            scale: float, or [queries].
            shifts: whether what changes at the layers is asked for; not with directions.
        """


_OFFERS: Mapping[type, str] = {
    LossOracle: "losses",
    SlopeOracle: "slopes",
    ActivationOracle: "activation noise",
    TimeOracle: "activation noise step by step",
}


def require_fed(left_out: Mapping[str, str], who: str) -> None:
    """Raises UsageError for a parameter that noise at the outputs of layers tells nothing of.

    Args:
        left_out: name -> why, from the oracle.
        who: the estimator.
    """
    for name, why in left_out.items():
        raise UsageError(
            f"{who} has no gradient of {name}: {why}. Set its requires_grad to False, or choose "
            "an estimator that perturbs weights."
        )


def require(oracle: object, needs: type, who: str) -> None:
    """Raises UsageError, naming both sides, unless `oracle` satisfies the protocol `needs`."""
    if isinstance(oracle, needs):
        return
    offered = [name for kind, name in _OFFERS.items() if isinstance(oracle, kind)]
    raise UsageError(
        f"{who} needs {_OFFERS.get(needs, needs.__name__)} ({needs.__name__}); "
        f"{type(oracle).__name__} offers only {' and '.join(offered) or 'none of the protocols'}. "
        "Choose an estimator that needs losses alone (`fwdlearn ls` shows what each one needs)."
    )


_forbidding = 0


@contextmanager
def forbid_backward() -> Iterator[None]:
    """Inside, nothing records a graph and every backward pass raises BackwardError.

    All of torch's reverse mode, `torch.func` included, goes through one call of the engine; that
    call is refused for the whole process while any such block is open.
    """
    global _forbidding

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise BackwardError(
            "a backward pass was asked for inside a forward-only run; remove the call to "
            "backward() or torch.autograd.grad() from the model, the objective or the estimator."
        )

    if _forbidding == 0:
        _engine.append(torch.autograd._engine_run_backward)
        torch.autograd._engine_run_backward = refuse
    _forbidding += 1
    try:
        with torch.no_grad():
            yield
    finally:
        _forbidding -= 1
        if _forbidding == 0:
            torch.autograd._engine_run_backward = _engine.pop()


_engine: list[Any] = []

T = TypeVar("T")


class ModelOracle:
    """Every kind of oracle on a model and a batch: perturbs, forbids backward, counts queries.

    Args:
        engine: runs the perturbed passes; shared by the oracles of a run.
        batch: the rows.
        dropout: names the dropout masks of the batch, for a model in training mode.

    Example:
        >>> from torch import nn
        >>> from fwdlearn.batch import Batch
        >>> from fwdlearn.engine import Engine
        >>> batch = Batch((torch.ones(4, 3),), torch.zeros(4, dtype=torch.int64))
        >>> engine = Engine(nn.Linear(3, 2), lambda output, targets: output.square().sum(1))
        >>> oracle = ModelOracle(engine, batch)
        >>> oracle.losses(torch.arange(4)).shape, oracle.queries
        (torch.Size([4]), 4)
    """

    def __init__(self, engine: Engine, batch: Batch, dropout: Key | None = None) -> None:
        self._engine, self._batch, self._dropout = engine, batch, dropout
        self._queries = 0
        self._known: Tensor | None = None
        self._kept: CleanPass | None = None
        self._home = home_of(engine.params)
        params = on_device(engine.params)
        self._params: Mapping[str, Tensor] = ReadParams(params, self._read)

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Name -> trainable tensor, read only."""
        return self._params

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self._batch)

    @property
    def queries(self) -> int:
        """Queries answered so far."""
        return self._queries

    def losses(
        self,
        row: Tensor,
        directions: Directions | None = None,
        direction: Tensor | None = None,
        scale: Tensor | float = 0.0,
    ) -> Tensor:
        """See `LossOracle.losses`; what `measure` has shown is answered without a query."""
        if directions is None and self._known is not None:
            return self._known[row]
        with forbid_backward(), torch.inference_mode():
            beside = self._beside(len(row))
            losses = self._retry(
                lambda: self._engine.losses(
                    self._batch, row, directions, direction, scale, self._dropout, **beside
                )
            )
        self._count(len(row))
        return losses.clone()

    def measure(self, residual: bool, keep: bool = False) -> Measured:
        """See `fwdlearn.signals.Measuring`."""
        with forbid_backward():
            if keep:
                activations = self._engine.activations
                kept = self._retry(lambda: activations.clean(self._batch, self._dropout, True))
                with torch.inference_mode():
                    clean = kept.measured(residual)
                self._kept = kept
            else:
                with torch.inference_mode():
                    beside = self._beside(self.rows)
                    clean = self._retry(
                        lambda: self._engine.measure(self._batch, residual, self._dropout, **beside)
                    )
        self._count(self.rows)
        self._known = clean.losses.clone()
        return clean

    def _beside(self, queries: int) -> dict[str, Any]:
        """What the engine is told beside, of a question with so many queries."""
        return {}

    def only(self, names: Collection[str]) -> Self:
        """The same oracle for a step that is about some parameters alone."""
        other = copy.copy(self)
        other._params = ReadParams({name: self._params[name] for name in names}, self._read)
        return other

    def _read(self) -> Mapping[str, Tensor]:
        with forbid_backward(), torch.inference_mode(), self._home.passing():
            read = self._engine.read(self._batch, self._dropout)
        return {name: entries.clone() for name, entries in read.items()}

    def slopes(
        self, row: Tensor, directions: Directions, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `SlopeOracle.slopes`."""
        with forbid_backward(), torch.inference_mode():
            beside = self._beside(len(row))
            losses, slopes = self._retry(
                lambda: self._engine.slopes(
                    self._batch, row, directions, direction, self._dropout, **beside
                )
            )
        self._count(len(row))
        return losses.clone(), slopes.clone()

    @property
    def sites(self) -> Mapping[str, Output]:
        """See `ActivationOracle.sites`."""

        def made() -> Mapping[str, Output]:
            found = self._outputs()
            own = {
                site: [n for n in one.params if n in self._params] for site, one in found.items()
            }
            return {
                site: replace(one, params=tuple(own[site]))
                for site, one in found.items()
                if own[site]
            }

        return Lazy(made)

    @property
    def left_out(self) -> Mapping[str, str]:
        """See `ActivationOracle.left_out`."""

        def made() -> Mapping[str, str]:
            self._outputs()
            left_out = self._engine.activations.left_out
            return {name: why for name, why in left_out.items() if name in self._params}

        return Lazy(made)

    def noisy_losses(
        self, row: Tensor, noise: Noise, index: Tensor, scale: Tensor | float
    ) -> Tensor:
        """See `ActivationOracle.noisy_losses`."""
        scales = torch.as_tensor(scale, dtype=torch.float64, device=row.device).expand(len(row))
        with forbid_backward(), torch.inference_mode():
            losses = self._retry(
                lambda: self._engine.activations.noisy_losses(
                    self._batch, row, noise, index, scales, self._dropout
                )
            )
        self._count(len(row))
        return losses.clone()

    def noisy_slopes(self, row: Tensor, noise: Noise, index: Tensor) -> tuple[Tensor, Tensor]:
        """See `ActivationOracle.noisy_slopes`."""
        with forbid_backward():
            answers = self._retry(
                lambda: self._engine.activity(self._batch, row, noise, index, self._dropout)
            )
        self._count(len(row))
        return answers

    def noisy_shifts(
        self, clean: CleanPass, row: Tensor, noise: Noise, index: Tensor, scale: Tensor | float
    ) -> Iterator[Shift]:
        """See `ActivationOracle.noisy_shifts`."""
        scales = torch.as_tensor(scale, dtype=torch.float64, device=row.device).expand(len(row))
        blocks = self._engine.activations.shifts(
            self._batch, clean.outputs, row, noise, index, scales, self._dropout
        )
        while True:
            # Nothing stays forbidden while the caller looks at a block.
            with forbid_backward(), torch.inference_mode(), self._home.passing():
                block = next(blocks, None)
            if block is None:
                return
            self._count(len(block.losses))
            yield block

    def clean(self, outputs: bool = False) -> CleanPass:
        """See `ActivationOracle.clean`; a pass that `measure` has kept is not run again."""
        if self._kept is not None:
            return self._kept
        with forbid_backward():
            clean = self._retry(
                lambda: self._engine.activations.clean(self._batch, self._dropout, outputs)
            )
        self._count(self.rows)
        return clean

    def gather(self, cotangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `ActivationOracle.gather`."""
        with forbid_backward():
            gradients = self._retry(
                lambda: self._engine.activations.gather(self._batch, cotangents, self._dropout)
            )
        self._count(self.rows)
        return gradients

    def _count(self, rows: int) -> None:
        self._queries += rows * self._batch.passes

    def _retry(self, run: Callable[[], T]) -> T:
        """Runs passes, in smaller blocks where memory runs out."""
        with self._home.passing():
            return self._engine.room.retry(run)

    def _outputs(self) -> Mapping[str, Output]:
        with forbid_backward(), torch.inference_mode(), self._home.passing():
            return self._engine.activations.outputs(self._batch, self._dropout)


class Lazy(Mapping[str, T]):
    """A mapping that is made when it is looked into: to ask what an oracle offers runs no model."""

    def __init__(self, make: Callable[[], Mapping[str, T]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, T]:
        return self._make()

    def __getitem__(self, name: str) -> T:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __repr__(self) -> str:
        return repr(dict(self))
