"""The loop: batch, plan, estimate, update, log. Forward passes only."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fwdlearn.allocator import Allocator, Block, Feedback, Plan
from fwdlearn.arithmetic import SHORT, alike
from fwdlearn.batch import Batch
from fwdlearn.blackbox import BlackBox, CallableOracle
from fwdlearn.data.buckets import bucketed
from fwdlearn.data.types import Data, Dataset, passes
from fwdlearn.engine import Choice, Engine
from fwdlearn.engine.calls import Calls
from fwdlearn.engine.offload import Offload, Resident, on_device
from fwdlearn.engine.outputs import output_sum
from fwdlearn.engine.params import read_only
from fwdlearn.engine.room import Room
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.errors import NonFiniteError, UsageError
from fwdlearn.estimator import Estimate, Estimator
from fwdlearn.forecast import foretold
from fwdlearn.gradient import ScaledGradient, spread_of
from fwdlearn.keys import Key
from fwdlearn.local import learn_locally, local_rows
from fwdlearn.memory import (
    in_use_bytes,
    keep_freed_pages,
    kept_below,
    peak_bytes,
    weights_bytes,
)
from fwdlearn.metrics import Scores
from fwdlearn.objectives import per_step, step_weights
from fwdlearn.oracle import ActivationOracle, ModelOracle, forbid_backward, require
from fwdlearn.progress import Journal, Pieces, Progress, Window
from fwdlearn.resolution import is_still, refuse
from fwdlearn.signals import check_signals, measured, read
from fwdlearn.step_oracle import StepOracle
from fwdlearn.steps import Carried, Sequences, Steps
from fwdlearn.update import handed

AnyEngine = Engine | Calls | TimeEngine


class Reporter(Protocol):
    """What a trainer tells of itself to: a sink."""

    def start(self, meta: dict[str, Any]) -> None: ...

    def log(self, record: dict[str, Any]) -> None: ...

    def finish(self, summary: dict[str, Any]) -> None: ...


class Schedule(Protocol):
    """A learning-rate schedule of torch, stepped once a step."""

    def step(self) -> None: ...


@dataclass(frozen=True)
class _Step:
    """A step before its update.

    Args:
        estimate: with all queries of the step, those for signals too.
        plan: that it was made with; None where it comes from a journal.
        signals: that the plan was made of.
        names: of the parameters that it is about.
    """

    estimate: Estimate
    plan: Plan | None
    signals: Mapping[str, Tensor]
    names: tuple[str, ...]

    def feedback(self, square_norms: Mapping[str, float]) -> Feedback:
        """What the allocator is told."""
        made = self.estimate
        rows = {name: value.detach().cpu() for name, value in made.rows.items()}
        loss, variance, _ = made.figures
        return Feedback(loss, sum(square_norms.values()), square_norms, variance, rows)


class Trainer:
    """Trains a model with forward passes only.

    Args:
        model: any module, already on `device` unless it is to be offloaded, or a `BlackBox`; its
            parameters that require a gradient are trained.
        data: training rows, and evaluation rows if there are any.
        objective: (output, targets) -> losses [rows].
        estimator: turns losses into a gradient.
        allocator: divides the queries of a step among its rows.
        optimizer: a torch optimizer on the model's trainable parameters.
        schedule: a torch learning-rate schedule, stepped once a step; where the allocator changes
            its budget and `queries` is given, once for what a step costs at first.
        batch_size: rows of a step, at least 1.
        steps: how many steps to take; or
        queries: a budget of queries, one forward pass of one row each: steps are taken while the
            next one fits. Exactly one of the two.
        seed: of all randomness, in [0, 2**64).
        every: steps of a sequence between updates, for a model that runs step by step: a step of
            the run is about so many steps of its sequences, and states and tangents are carried
            on to the next. None for whole sequences.
        device: where batches go.
        evaluate_every: steps between evaluations, or None to evaluate at the end alone.
        evaluation_batch_size: rows of an evaluation pass.
        bucket: the shuffled rows of so many batches are sorted by length before they are divided,
            so that rows of a batch are of much the same length and little of it is padding; the
            batches come in a random order. 1 sorts nothing.
        log_every: steps between records.
        train_mode: puts the model into training mode: dropout with one mask a row and step,
            batch normalisation on the batch's own statistics.
        rung: how perturbed passes run: "auto", "fold", "copies" or "sequential".
        memory_budget: bytes that a forward pass of queries may take at its peak.
        compile: whether folded passes run as compiled graphs; slow to start, off by default.
        offload: where weights and what the optimizer keeps of them lie while the device does not
            use them: "cpu" for the memory of the host, a folder for files on a disk; None keeps
            all on the device. Changes no result. See `fwdlearn.engine.offload`.
        divergence: a run has diverged once the mean loss since the last record is above that of
            the first step by more than so many times its size, and 1 at least; positive, or None
            never to look.
        metrics: name -> function of a row, see `fwdlearn.scoring`; evaluations have its mean.
        sinks: told of the start, of every record and of the end.
        journal: told of every step; a run that has one can be gone on with.

    Raises:
        UsageError: a setting is out of range, or the parts do not fit each other.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        objective: Callable[[Any, Tensor], Tensor],
        estimator: Estimator,
        allocator: Allocator,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Schedule | None = None,
        batch_size: int = 32,
        steps: int | None = None,
        queries: int | None = None,
        seed: int = 0,
        every: int | None = None,
        device: str = "cpu",
        evaluate_every: int | None = None,
        evaluation_batch_size: int = 256,
        bucket: int = 1,
        log_every: int = 10,
        train_mode: bool = False,
        rung: str = "auto",
        memory_budget: int | None = None,
        compile: bool = False,
        offload: str | None = None,
        divergence: float | None = 10.0,
        metrics: Mapping[str, Callable[[Any, Any], float]] | None = None,
        sinks: Sequence[Reporter] = (),
        journal: Journal | None = None,
    ) -> None:
        counts = {
            "batch_size": batch_size,
            "steps": steps,
            "queries": queries,
            "every": every,
            "evaluate_every": evaluate_every,
            "evaluation_batch_size": evaluation_batch_size,
            "bucket": bucket,
            "log_every": log_every,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise UsageError(f"Trainer({name}=...) must be at least 1, got {value}.")
        if divergence is not None and not divergence > 0:
            raise UsageError(f"Trainer(divergence=...) must be positive, got {divergence}.")
        if bucket > 1 and not hasattr(data.train, "lengths"):
            raise UsageError(
                f"Trainer(bucket={bucket}) sorts rows by their length, and these have none; leave "
                "it out for data that are no tokens."
            )
        if (steps is None) == (queries is None):
            raise UsageError("Trainer needs exactly one of steps=... and queries=... .")
        if not len(data.train):
            raise UsageError("Trainer(data=...) has no training rows.")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UsageError(
                f"{type(optimizer).__name__} evaluates the loss inside its step; choose an "
                "optimizer that reads gradients, such as SGD or Adam."
            )
        self.model, self.data, self.objective = model, data, objective
        self.estimator, self.allocator = estimator, allocator
        self.optimizer, self.schedule = optimizer, schedule
        # An optimizer that asks how many directions a gradient is the mean of, or how far their
        # slopes spread, is told. By number, because a state that is loaded brings new groups.
        groups = list(enumerate(optimizer.param_groups))
        self._asking = {
            name: [number for number, group in groups if group.get(name, 0) is None]
            for name in ("tangents", "spread")
        }
        self.steps, self.budget = steps, queries
        self.batch_size = min(batch_size, len(data.train))
        self.device, self.seed, self.train_mode = device, seed, train_mode
        self.evaluate_every, self.log_every, self.bucket = evaluate_every, log_every, bucket
        self.evaluation_batch_size, self.divergence = evaluation_batch_size, divergence
        # Of its own: where a whole batch is too much, a block of queries may not be.
        self.evaluation_room = Room()
        self.metrics, self.sinks, self.journal = metrics or {}, sinks, journal or Journal()
        self.key = Key.root(seed)
        self.offload, self.home = offload, self._home(offload)
        self.engine: AnyEngine = self._engine(model)(model, objective, rung, memory_budget, compile)
        self.every, self._pieces = every, 1
        if every is not None:
            self._pieces = self._divided(every)
        self._check_parts()

    def train(self) -> dict[str, Any]:
        """Runs all steps.

        Returns:
            The summary: `status`, `steps`, `queries`, `forwards` (queries / batch size),
            `seconds`, `train.loss` (of the last record), `eval.*`, `memory.*`, `engine.*`, `seed`.

        Raises:
            NonFiniteError: losses or gradients are no longer finite, or training has diverged.
            UsageError: the estimator's noise is lost in the rounding of the model's numbers.
        """
        before = in_use_bytes(self.device)
        with self._mode(self.train_mode):
            self._choose()
            at = self.journal.resume(self, self.start())
            choice = self._choose()
            begun = time.monotonic() - at.seconds
            self._tell("start", self._meta())
            while self._affords(at):
                at.step += 1
                started, halvings = time.monotonic(), self.engine.room.halvings
                made = self._made(at)
                if at.step == 1 and made.plan is not None and is_still(made.estimate):
                    self._check_noise(made.plan)
                if self.engine.room.halvings > halvings:
                    self._log(at, begun, {"engine.halvings": self.engine.room.halvings})
                if self.engine.choice is not choice:
                    choice = self._choose()
                    stepped = {"engine.rung": choice.rung, "engine.reason": choice.reason}
                    self._log(at, begun, stepped)
                self.journal.append(at, made.estimate)
                lr = self.optimizer.param_groups[0]["lr"]
                with self.journal.whole():
                    self._advance(at, made, started)
                # What it holds goes before the next one is made.
                del made
                if at.step % self.log_every == 0 or not self._affords(at):
                    at.last = at.window.record()
                    noted = {f"optimizer.{name}": value for name, value in self._noted().items()}
                    self._log(at, begun, {"lr": float(lr), **at.last, **noted})
                    at.window = Window()
                    self._check_course(at)
                if self.evaluate_every and at.step % self.evaluate_every == 0:
                    at.scores = self._evaluated(at, begun)
                at.seconds = time.monotonic() - begun
                self.journal.stepped(at)
            if self.data.evaluation is not None and (
                not self.evaluate_every or at.step % self.evaluate_every
            ):
                at.scores = self._evaluated(at, begun)
        summary = {
            "status": "finished",
            "steps": at.step,
            "queries": at.spent,
            "forwards": at.spent / self.batch_size,
            "seconds": time.monotonic() - begun,
            "train.loss": at.last.get("train.loss"),
            "eval.loss": at.scores.get("loss"),
            "eval.accuracy": at.scores.get("accuracy"),
            **{f"eval.{name}": value for name, value in at.scores.items()},
            "memory.start_bytes": before,
            "memory.peak_bytes": peak_bytes(self.device),
            "memory.weights_bytes": weights_bytes(self.model),
            "engine.rung": choice.rung,
            "engine.reason": choice.reason,
            "engine.halvings": self.engine.room.halvings,
            "seed": self.seed,
        }
        self._tell("finish", summary)
        return summary

    def evaluate(self, dataset: Dataset | None = None) -> dict[str, float]:
        """The figures of `fwdlearn.metrics`, of `dataset` or the evaluation rows."""
        dataset = self.data.evaluation if dataset is None else dataset
        if dataset is None or not len(dataset):
            raise UsageError("there are no evaluation rows; give the data some, or a dataset.")
        scores, left = Scores(self.metrics), torch.arange(len(dataset))
        room, size = self.evaluation_room, self.evaluation_batch_size

        def passed() -> tuple[int, Batch, tuple[Tensor, object]]:
            some = left[: room.of(size)]
            batch = dataset.batch(some).to(self.device)
            return len(some), batch, self.engine.evaluate(batch)

        with self.plain():
            while len(left):
                count, batch, (losses, output) = room.retry(passed)
                scores.add(losses, output, batch.targets)
                left = left[count:]
        return scores.result()

    def estimate(self) -> Estimate:
        """The estimate of the first step; nothing is changed by it.

        Raises:
            NonFiniteError: its loss is not finite.
        """
        with self._mode(self.train_mode):
            self._choose()
            at = self.start()
            return self._estimate(0, at.state, at.plans)[0].estimate

    def explain(self) -> dict[str, Any]:
        """What a run would do and take, from a few steps that are thrown away.

        Returns:
            `rung`, `reason`, `memory_bytes` (at the peak: on a CPU of the whole process),
            `memory_parts` (bytes by what takes them; the last three not at the same time),
            `memory_room_bytes` (what there is), `fits`, `offload` (as it is set), `offloaded_bytes`
            (of weights and what the optimizer keeps of them, elsewhere), `with_offload_bytes` (of a
            run that has none: the peak if it had), `queries_per_second` and the counts of a run.
        """
        return foretold(self)

    def batch(self, step: int) -> Batch:
        """The batch of a step: a pure function of (seed, epoch, step)."""
        batch = self.data.train.batch(self.examples(step)).to(self.device)
        if self.every is None:
            return batch
        begin = step % self._pieces * self.every
        # The last piece of its sequences may be shorter.
        piece = slice(begin, begin + self.every)
        return batch.map(lambda value: value[:, piece])

    def examples(self, step: int) -> Tensor:
        """int64 [rows]: the numbers of the training rows of a step's batch."""
        step //= self._pieces
        if getattr(self.data.train, "endless", False):
            # From a place of the run's own, so that runs with other seeds see other rows.
            place = int(self.key.fold("data").uniform(1)[0] * (len(self.data.train) >> 1))
            return place + step * self.batch_size + torch.arange(self.batch_size)
        per_epoch = len(self.data.train) // self.batch_size
        epoch, place = divmod(step, per_epoch)
        return self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def start(self) -> Progress:
        """Before the first step."""
        state = self.estimator.init(on_device(self.engine.params))
        if self.every is not None:
            state = Pieces(state, Carried())
        return Progress(state, self.allocator.init())

    def step_key(self, step: int) -> Key:
        """Of the randomness of a step's estimate, steps numbered from 0.

        Directions stay where they are until a sequence is over.
        """
        number = step // self._pieces
        # Asked for more than once a step, and a thousandth of a short one.
        if getattr(self, "_keyed", (None,))[0] != number:
            self._keyed = (number, self.key.fold("step").fold(number))
        return self._keyed[1]

    def oracle(self, step: int, batch: Batch | None = None) -> ModelOracle | CallableOracle:
        """What a step asks, which is numbered from 0; of its `batch`, if that is there already."""
        batch = self.batch(step) if batch is None else batch
        return self._oracle(batch, self.step_key(step).fold("dropout"))

    def _made(self, at: Progress) -> _Step:
        """The estimate of the step `at.step`, which counts from 1: from the journal, or made."""
        known = self.journal.recorded(at)
        if known is not None:
            return _Step(known, None, {}, tuple(self.engine.params))
        made, at.state, at.plans = self._estimate(at.step - 1, at.state, at.plans)
        return made

    def _advance(self, at: Progress, made: _Step, started: float) -> None:
        """Everything that an estimate changes."""
        if at.step == 1:
            at.first = made.estimate.figures[0]
        square_norms = self._update(made.estimate, made.names)
        feedback = made.feedback(square_norms)
        if made.plan is not None:
            at.plans = self.allocator.observe(made.plan, made.signals, feedback, at.plans)
        at.spent += made.estimate.queries + self._learn(at.step - 1)
        self._reschedule(at)
        at.window.add(made.estimate, feedback.square_norm, time.monotonic() - started)

    def _order(self, epoch: int) -> Tensor:
        if getattr(self, "_ordered", (None,))[0] != epoch:
            key = self.key.fold("data").fold(epoch)
            order = key.permutation(len(self.data.train))
            if self.bucket > 1:
                lengths: Tensor = self.data.train.lengths  # type: ignore[attr-defined]
                order = bucketed(order, lengths, self.batch_size, self.bucket, key)
            self._ordered = (epoch, order)
        return self._ordered[1]

    def _estimate(self, step: int, state: Any, plans: Any) -> tuple[_Step, Any, Any]:
        key, batch = self.step_key(step), self.batch(step)
        oracle = self.oracle(step, batch)
        if self.every is not None:
            assert isinstance(oracle, StepOracle)
            oracle.go_on(state.carried if step % self._pieces else Carried())
            state = state.state
        keep = self.estimator.traits.needs is ActivationOracle
        signals = read(self.allocator.signals, oracle, batch, self.examples(step), keep)
        plan, plans = self.allocator.allocate(
            len(batch), signals, plans, key=self.key.fold("plan").fold(step // self._pieces)
        )
        if plan.block is not None:
            oracle = oracle.only(plan.block.names(oracle.params))
        with self.home.passing():
            estimate, state = self.estimator.estimate(
                oracle, oracle.params, state, key=key, plan=plan.to(self.device)
            )
        if self.every is not None:
            assert isinstance(oracle, StepOracle)
            state = Pieces(state, oracle.carried)
        if plan.block is not None:
            estimate = _counted(estimate, plan.block)
        self._answer("tangents", lambda: int(estimate.info.get("tangents", plan.directions)))
        estimate = replace(estimate, queries=oracle.queries)
        loss = estimate.figures[0]
        if not math.isfinite(loss):
            raise NonFiniteError(f"step {step + 1}: the loss is {loss}; lower the learning rate.")
        return _Step(estimate, plan, signals, tuple(oracle.params)), state, plans

    def _engine(self, model: nn.Module) -> Callable[..., AnyEngine]:
        """What runs the passes of a model."""
        if isinstance(model, BlackBox):
            return Calls
        return TimeEngine if isinstance(model, Steps) else Engine

    def _oracle(self, batch: Batch, dropout: Key | None = None) -> ModelOracle | CallableOracle:
        if isinstance(self.engine, Calls):
            return CallableOracle(self.engine.box, batch, self.objective)
        if isinstance(self.engine, TimeEngine):
            return StepOracle(self.engine, batch, dropout)
        return ModelOracle(self.engine, batch, dropout)

    def _check_noise(self, plan: Plan) -> None:
        """When no loss of the first step has moved: whether anything has."""
        if isinstance(self.engine, Calls):
            return
        budget = self.engine.memory_budget
        engine = self._engine(self.model)(self.model, output_sum, "auto", budget)
        batch, key = self.batch(0), self.step_key(0)
        if self.every is not None and not step_weights(batch.targets).any():
            # A piece of a sequence in which nothing counts tells nothing.
            return

        def run(estimator: Estimator) -> Estimate:
            kind: Any = StepOracle if isinstance(engine, TimeEngine) else ModelOracle
            oracle = kind(engine, batch, key.fold("dropout"))
            if plan.block is not None:
                oracle = oracle.only(plan.block.names(oracle.params))
            state, asked = estimator.init(oracle.params), plan.to(self.device)
            return estimator.estimate(oracle, oracle.params, state, key=key, plan=asked)[0]

        refuse(self.estimator, run)

    def _cost(self, plans: Any) -> int:
        """Queries of the next step."""
        pairs, signals = self.allocator.budget(self.batch_size, plans), self.allocator.signals
        estimate = self.estimator.traits.cost(self.batch_size, pairs, measured(signals))
        return estimate * passes(self.data.train) + self._local_rows

    @cached_property
    def _local_rows(self) -> int:
        """Rows that modules learn from; to look for such modules takes a tenth of a short step."""
        return local_rows(self.model, self.batch_size)

    def _learn(self, step: int) -> int:
        """Lets modules learn from the rows of a step; the queries that it took."""
        if not self._local_rows:
            return 0
        with self._mode(False), forbid_backward(), self.home.passing():
            return learn_locally(self.model, self.batch(step))

    def _affords(self, at: Progress) -> bool:
        if self.budget is None:
            assert self.steps is not None
            return at.step < self.steps
        return at.spent + self._cost(at.plans) <= self.budget

    @torch.no_grad()
    def _update(self, estimate: Estimate, names: Iterable[str]) -> dict[str, float]:
        """One tensor at a time, so that one dense gradient is alive at once; the squared norms."""
        self._answer("spread", lambda: spread_of(estimate.grad))
        square_norms: dict[str, float] = {}
        for name in names:
            parameter = self.engine.params[name]
            with (
                self.home.updating(self.optimizer, parameter),
                handed(self.optimizer, estimate.grad, name, parameter) as found,
            ):
                square = float(found)
                if not math.isfinite(square):
                    raise NonFiniteError(
                        f"the gradient of {name} is not finite; lower the learning rate or raise "
                        "sigma."
                    )
                square_norms[name] = square
                with alike(parameter.dtype in SHORT):
                    self.optimizer.step()
        return square_norms

    def _answer(self, name: str, find: Callable[[], float]) -> None:
        """Tells the optimizer's groups that ask."""
        asking = self._asking[name]
        if not asking:
            return
        found = find()
        for number in asking:
            self.optimizer.param_groups[number][name] = found

    def _check_course(self, at: Progress) -> None:
        """After a record: whether training still is where it could be going somewhere."""
        loss, first = at.last["train.loss"], at.first
        if self.divergence is None or not loss > first + self.divergence * max(1.0, abs(first)):
            return
        raise NonFiniteError(
            f"step {at.step}: training has diverged: the loss is {loss:.4g}, and was {first:.4g} "
            f"at the start (trainer.divergence, {self.divergence:g}, says what is too much); "
            "lower the learning rate."
        )

    def _reschedule(self, at: Progress) -> None:
        """Brings the schedule to where the run is, measured in what it has steps or queries for."""
        if self.schedule is None:
            return
        due = at.step
        if self.budget is not None:
            due = at.spent // self._cost(self.allocator.init())
        while at.scheduled < due:
            self.schedule.step()
            at.scheduled += 1

    def _noted(self) -> Mapping[str, float]:
        """What the optimizer has to say beside its steps."""
        noted: Mapping[str, float] = getattr(self.optimizer, "info", {})
        return noted

    def _planned(self) -> int:
        """Steps of the run; where the allocator changes its budget, if it did not."""
        if self.steps is not None:
            return self.steps
        assert self.budget is not None
        return self.budget // self._cost(self.allocator.init())

    def _choose(self) -> Choice:
        if self.engine.choice is None:
            if torch.device(self.device).type == "cpu":
                keep_freed_pages(min(self.home.kept_pages, kept_below(self.model)))
            if self.offload is not None:
                first = torch.zeros(1, dtype=torch.int64, device=self.device)
                with self.plain():
                    self.home.check(self.engine.evaluate(self.batch(0).select(first))[0])
            with forbid_backward(), torch.inference_mode(), self.home.passing():
                self.engine.choose(self.batch(0), self.key.fold("dropout"))
        assert self.engine.choice is not None
        return self.engine.choice

    def _divided(self, every: int) -> int:
        """Pieces of a sequence."""
        batch = self.data.train.batch(torch.arange(1))
        if not isinstance(self.engine, TimeEngine) or not per_step(batch.targets):
            raise UsageError(
                f"Trainer(every={every}) updates within sequences: the model must run step by "
                "step (`fwdlearn.steps`), without backpropagation, and each step must have a "
                "target. Leave it out to take whole sequences."
            )
        if self.estimator.traits.needs is ActivationOracle:
            raise UsageError(
                f"Trainer(every={every}) carries states from piece to piece, and "
                f"{type(self.estimator).__name__} takes whole sequences; CausalNodePerturbation "
                "has noise in layers too."
            )
        return math.ceil(Sequences.of(batch, self.objective).steps / every)

    def _check_parts(self) -> None:
        oracle = self._oracle(Batch((), torch.zeros(1)))
        require(oracle, self.estimator.traits.needs, type(self.estimator).__name__)
        check_signals(type(self.allocator).__name__, self.allocator.signals)
        if self._planned() < 1:
            raise UsageError(
                f"Trainer(queries={self.budget}) is less than one step, which takes "
                f"{self._cost(self.allocator.init())} queries."
            )
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missed = [name for name, p in self.engine.params.items() if id(p) not in trained]
        if missed:
            raise UsageError(
                f"the optimizer does not hold {missed[0]}, which requires a gradient; give it all "
                "trainable parameters, or set requires_grad to False."
            )
        fixed = read_only(self.engine.params)
        if fixed:
            raise UsageError(
                f"{fixed[0]} lies in memory that cannot be written, mapped from a file perhaps, "
                "and training would have to; clone() it into a parameter of its own, or set "
                "requires_grad to False."
            )

    def _home(self, offload: str | None) -> Resident:
        """What knows where the weights are."""
        if offload is None:
            return Resident()
        if isinstance(self.model, BlackBox):
            raise UsageError(
                "Trainer(offload=...) brings weights to the device, and a black box runs "
                "elsewhere; leave it out."
            )
        return Offload(self.model, self.device, None if offload == "cpu" else offload)

    def _mode(self, training: bool) -> Any:
        return _training(self.model, training)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within, plain passes can run in evaluation mode."""
        with self._mode(False), forbid_backward(), torch.inference_mode(), self.home.passing():
            yield

    def _meta(self) -> dict[str, Any]:
        choice = self._choose()
        return {
            "steps": self._planned(),
            "queries": self._planned() * self._cost(self.allocator.init()),
            "rows": self.batch_size,
            "parameters": sum(p.numel() for p in self.engine.params.values()),
            "rung": choice.rung,
            "reason": choice.reason,
        }

    def _evaluated(self, at: Progress, begun: float) -> dict[str, float]:
        before = self.evaluation_room.halvings
        scores = self.evaluate()
        record: dict[str, Any] = {f"eval.{name}": value for name, value in scores.items()}
        if self.evaluation_room.halvings > before:
            record["eval.halvings"] = self.evaluation_room.halvings
        self._log(at, begun, record)
        return scores

    def _log(self, at: Progress, begun: float, record: Mapping[str, Any]) -> None:
        head = {"step": at.step, "queries": at.spent, "seconds": time.monotonic() - begun}
        self._tell("log", {**head, **record})

    def _tell(self, event: str, message: dict[str, Any]) -> None:
        for sink in self.sinks:
            getattr(sink, event)(message)


def _counted(estimate: Estimate, block: Block) -> Estimate:
    """The estimate of a block that was drawn by chance."""
    info, factors = dict(estimate.info), {name: block.factor(name) for name in estimate.grad}
    if "variance" in info:
        if len(set(factors.values())) == 1:
            info["variance"] = info["variance"] / block.probability**2
        else:
            # How it is divided among the parameters is not known.
            del info["variance"]
    return replace(estimate, grad=ScaledGradient(estimate.grad, factors), info=info)


class _training:
    """Puts a model into training or evaluation mode, and each of its modules back afterwards."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        self.model, self.training = model, training

    def __enter__(self) -> None:
        self.before = [(module, module.training) for module in self.model.modules()]
        self.model.train(self.training)

    def __exit__(self, *error: object) -> None:
        for module, training in self.before:
            module.training = training
