"""Noise at the outputs of layers, step by step: a clean pass and noisy ones side by side.

At each step the clean rows go first and hand over their layers' inputs; the noisy queries follow
with states of their own. Nothing of a step is kept beyond it but the states, unless who asks does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine.head import by_output
from fwdlearn.engine.local import PRODUCTS
from fwdlearn.engine.passes import Gradients, Pass
from fwdlearn.engine.queries import Queries
from fwdlearn.engine.shifts import Shifting
from fwdlearn.engine.trace import Rows, TraceError, Use
from fwdlearn.engine.visits import Gathering, Local, Noisy, Survey, Visitor
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import Noise, Output, SiteNoise
from fwdlearn.objectives import at_step
from fwdlearn.steps import Sequences, State

if TYPE_CHECKING:
    from fwdlearn.engine.through_time import TimeEngine


@dataclass(frozen=True)
class Moment:
    """One step of a clean pass and of noisy queries; see `fwdlearn.oracle.Moment`."""

    step: int
    clean: Tensor
    losses: Tensor
    shifts: Mapping[str, Tensor]
    kept: list[Local] = field(repr=False)
    head: Callable[[], Mapping[str, Tensor]] = field(repr=False)

    @cached_property
    def exact(self) -> Mapping[str, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return self.head()

    def gather(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gradients: Gradients = {}
        with torch.no_grad():
            for local in self.kept:
                for one in getattr(cotangents, "maps", (cotangents,)):
                    if local.site in one:
                        local.add(one[local.site], gradients)
                        break
        return gradients


class Moments:
    """Runs sequences step by step with noise in the layers.

    Args:
        engine: knows the model, its parameters and its objective.

    Attributes:
        left_out: name of a parameter -> why a part of its gradient cannot be had.
        head: see `TimeOracle.step_head`; once `outputs` has been asked.
    """

    def __init__(self, engine: TimeEngine) -> None:
        self.engine = engine
        self.left_out: dict[str, str] = {}
        self._outputs: dict[Any, Mapping[str, Output]] = {}
        self._sites: list[list[str | None]] = []
        self.head: str | None = None

    def outputs(self, sequences: Sequences) -> Mapping[str, Output]:
        """Name of a site -> what a row puts out there at a step."""
        kind = (tuple(sequences.inputs.shape[2:]), sequences.inputs.dtype)
        if kind not in self._outputs:
            try:
                self._outputs[kind] = self._survey(sequences)
            except TraceError as error:
                raise UsageError(
                    f"noise cannot be added to the layers of this model: {error}. Choose an "
                    "estimator that perturbs weights."
                ) from error
        return self._outputs[kind]

    def run(
        self,
        sequences: Sequences,
        row: Tensor,
        noise: Callable[[int], Noise | Directions],
        index: Tensor,
        scale: Tensor,
        shifts: bool,
        before: State | None = None,
        number: int = 0,
    ) -> Iterator[tuple[Moment, State]]:
        """Each step, and the states of the rows after it.

        Args:
            row: int64 [queries].
            noise: step -> noise of that step; numbers may be none.
            index: int64 [queries].
            scale: float64 [queries].
            shifts: whether what has changed at every site is asked for.
            before: the states of the rows before the first step, from which noisy queries begin
                too; None at the start of a sequence.
            number: of the first step.
        """
        engine, every = self.engine, torch.arange(sequences.rows, device=row.device)
        known = self.outputs(sequences)
        head, first, rest = engine.traced(PRODUCTS, sequences, None)
        begun: Pass | None = None
        if before is None:
            calm, begun = self._begun(head, sequences.rows)
            noisy: State = {}
        else:
            calm, noisy = before, {name: value[row] for name, value in before.items()}
        for step in range(sequences.steps):
            begins = step == 0 and before is None
            uses, sites = (first, self._sites[0]) if begins else (rest, self._sites[1])
            kept: list[Local] = []
            seen: dict[str, Tensor] = {}

            def take(local: Local, out: Tensor) -> None:
                kept.append(local)  # noqa: B023
                if shifts:
                    # A copy, because the model may overwrite its own.
                    wide = torch.promote_types(out.dtype, torch.float32)
                    seen[local.site] = out.to(wide, copy=True)  # noqa: B023

            mode: Visitor = Gathering(
                engine.params, uses, sequences.rows, sites=sites, take=take, keep=True
            )
            output, calm = self._stepped(mode, sequences.input(step, every), calm, begun)
            begun = None
            clean = sequences.loss(step, every, output)
            exact = partial(self._exact, sequences, step, output)
            losses: Tensor | None = None
            moved: dict[str, Tensor] = {}
            if len(row):
                current = noise(number + step)
                if not isinstance(current, Directions):
                    _check(current, known)
                asked = _Asked(row, current, index, scale, seen if shifts else None)
                made_of = head if begins else None
                losses, noisy, moved = engine.room.retry(
                    partial(self._noisy, sequences, step, (uses, sites), asked, noisy, made_of)
                )
            zero = torch.zeros(0, device=row.device, dtype=engine.wide)
            yield (
                Moment(
                    number + step,
                    zero.new_zeros(sequences.rows) if clean is None else clean,
                    zero.new_zeros(len(row)) if losses is None else losses,
                    moved,
                    kept,
                    exact,
                ),
                calm,
            )

    def _noisy(
        self,
        sequences: Sequences,
        step: int,
        layers: tuple[Sequence[Use], Sequence[str | None]],
        asked: _Asked,
        state: State,
        head: Sequence[Use] | None,
    ) -> tuple[Tensor | None, State, dict[str, Tensor]]:
        """A step of all noisy queries: losses, states and shifts, in blocks where memory is short.

        Args:
            layers: what the step uses, and the site of each.
            state: before the step.
            head: what an initial state uses, where the step begins with one.
        """
        count, found = len(asked.row), []
        for part in torch.arange(count, device=asked.row.device).split(self.engine.room.of(count)):
            whole = len(part) == count
            some, before = asked if whole else asked.at(part), None
            mine = state if whole else {name: value[part] for name, value in state.items()}
            if head is not None:
                mine, before = self._begun(head, len(part))
            x = sequences.input(step, some.row)
            if isinstance(some.noise, Directions):
                output, mine = self._weights(sequences, x, mine, some)
                shifts: dict[str, Tensor] = {}
            else:
                mode = some.mode(self.engine.params, *layers)
                output, mine = self._stepped(mode, x, mine, before)
                shifts = getattr(mode, "shifts", {})
            found.append((sequences.loss(step, some.row, output), mine, shifts))
        if len(found) == 1:
            return found[0]
        losses, states, moved = zip(*found, strict=True)
        known = [one for one in losses if one is not None]
        return torch.cat(known) if known else None, _joined(states), _joined(moved)

    def _weights(
        self, sequences: Sequences, x: Tensor, state: State, asked: _Asked
    ) -> tuple[Any, State]:
        """A step of queries, each with weights of its own."""
        noise = asked.noise
        assert isinstance(noise, Directions)
        targets = Batch((), sequences.targets)
        queries = Queries(targets, asked.row, noise, asked.index, asked.scale)
        with self.engine.watched(sequences) as start, start(queries) as fold:
            output, state = self.engine.model.step(x, state)
        fold.finish()
        return output, state

    def _begun(self, head: Sequence[Use], rows: int) -> tuple[State, Survey]:
        """The first state, and the pass that knows which of it is made of parameters."""
        mode = Survey(self.engine.params, head, rows)
        with mode:
            state = self.engine.model.initial(rows)
        mode.finish()
        return state, mode

    def _stepped(
        self, mode: Any, x: Tensor, state: State, before: Pass | None = None
    ) -> tuple[Any, State]:
        if before is not None:
            mode.made |= before.made
        with mode:
            output, state = self.engine.model.step(x, state)
        mode.finish()
        return output, state

    def _exact(self, sequences: Sequences, step: int, output: Any) -> Mapping[str, Tensor]:
        """The derivative of a step's losses by what the last layer puts out."""
        if self.head is None:
            return {}
        losses = sequences.losses(step, torch.arange(sequences.rows, device=output.device))
        if losses is None:
            return {self.head: torch.zeros_like(output)}
        return {self.head: by_output(losses, output, sequences.rows, Rows(0)).to(output.dtype)}

    def _survey(self, sequences: Sequences) -> Mapping[str, Output]:
        engine, rows = self.engine, min(2, sequences.rows)
        head, first, rest = engine.traced(PRODUCTS, sequences, None)
        with torch.no_grad():
            row = torch.arange(rows, device=sequences.inputs.device)
            state, start = self._begun(head, rows)
            x, surveys = sequences.input(0, row), []
            for uses, before in ((first, start), (rest, None)):
                survey = Survey(engine.params, uses, rows)
                _, state = self._stepped(survey, x, state, before)
                surveys.append(survey)
            self._sites = [survey.sites for survey in surveys]
            self.left_out = {**surveys[0].left_out, **surveys[1].left_out}
            for site in start.outputs.values():
                for name in site.params:
                    self.left_out.setdefault(name, "the initial state is made of it")
            outputs = surveys[1].outputs
            if list(surveys[0].outputs) != list(outputs):
                raise TraceError("the first step has other layers than the rest")
            self.head = self._last(sequences, rest, state, x, rows, outputs)
        return outputs

    def _last(
        self,
        sequences: Sequences,
        uses: Sequence[Use],
        state: State,
        x: Tensor,
        rows: int,
        outputs: Mapping[str, Output],
    ) -> str | None:
        """The site that puts out what a step does, unless the next state depends on it."""
        mode = Gathering(
            self.engine.params,
            uses,
            rows,
            sites=self._sites[1],
            take=lambda local, out: None,
            keep=False,
        )
        output, calm = self._stepped(mode, x, state)
        if mode.last is None or mode.last[1] is not output or mode.last[2] != Rows(0):
            return None
        site = mode.last[0]
        index = torch.arange(rows, device=x.device)
        noise = SiteNoise(Key.root(0), outputs, rows, only=(site,))
        adding = Noisy(
            self.engine.params,
            uses,
            rows,
            sites=self._sites[1],
            noise=noise,
            index=index,
            scale=torch.ones(rows, dtype=torch.float64, device=x.device),
        )
        _, noisy = self._stepped(adding, x, state)
        if not all(torch.equal(calm[name], noisy[name]) for name in calm):
            return None
        step = next((n for n in range(sequences.steps) if sequences.counts(n)), None)
        losses = None if step is None else sequences.losses(step, index)
        if losses is None:
            # A piece of a sequence of which nothing counts: any target shows a derivative.
            any_target = torch.zeros_like(sequences.target(0)[index])
            ones = torch.ones(rows, device=x.device)
            losses = partial(at_step, sequences.objective, targets=any_target, weights=ones)
        return site if by_output(losses, output, rows, Rows(0)).any() else None


@dataclass(frozen=True)
class _Asked:
    """Noisy queries of a step.

    Args:
        row, index: int64 [queries].
        scale: float64 [queries].
        clean: name of a layer -> what rows put out there without noise, where shifts are wanted.
    """

    row: Tensor
    noise: Noise | Directions
    index: Tensor
    scale: Tensor
    clean: Mapping[str, Tensor] | None

    def at(self, part: Tensor) -> _Asked:
        """Some of them."""
        row, index, scale = self.row[part], self.index[part], self.scale[part]
        return replace(self, row=row, index=index, scale=scale)

    def mode(
        self, params: Mapping[str, Tensor], uses: Sequence[Use], sites: Sequence[str | None]
    ) -> Any:
        """Adds the noise to the layers of a step."""
        adding: Any = Noisy
        if self.clean is not None:
            adding = partial(Shifting, row=self.row, clean=self.clean)
        return adding(
            params,
            uses,
            len(self.row),
            sites=sites,
            noise=self.noise,
            index=self.index,
            scale=self.scale,
        )


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check(noise: Noise, known: Mapping[str, Output]) -> None:
    for name in noise.names:
        if name not in known:
            raise UsageError(
                f"{name!r} is no layer's output; the first of them are "
                f"{', '.join(list(known)[:3])}."
            )
