"""What a run will take, from steps that are thrown away: bytes that are counted, seconds measured.

The weights and the optimizer stay as they are. An update is rehearsed on a twin of the optimizer
with a state of its own, one parameter at a time, as training does it.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.engine.footprint import LiveBytes, footprint
from fwdlearn.engine.offload import Offload
from fwdlearn.estimator import Estimate
from fwdlearn.memory import free_bytes, in_use_bytes, peak_bytes, private_bytes, weights_bytes
from fwdlearn.update import handed

if TYPE_CHECKING:
    from fwdlearn.trainer import Trainer


@dataclass(frozen=True)
class Step:
    """Bytes of a step, beside weights and optimizer state.

    Args:
        estimate: at the peak of an estimate: activations of a block, numbers of directions.
        held: what is left of them in the update.
        update: at the peak of an update, beside what is held: the largest dense gradient.
        optimizer: what the optimizer keeps from step to step.
    """

    estimate: int
    held: int
    update: int
    optimizer: int

    @property
    def peak(self) -> int:
        return max(self.estimate, self.held + self.update)


def foretold(run: Trainer) -> dict[str, Any]:
    """See `Trainer.explain`."""
    first = run.allocator.init()
    state, step, plan = run.start().state, -1, Plan.uniform(1, 1)
    device, home = torch.device(run.device), run.home

    def estimate() -> Estimate:
        nonlocal step, state, plan
        step += 1
        made, state, _ = run._estimate(step, state, first)
        assert made.plan is not None
        plan = made.plan
        return made.estimate

    with run._mode(run.train_mode):
        choice = run._choose()
        # Weights that lie in a mapped file take memory once they are read.
        first_row = torch.zeros(1, dtype=torch.int64, device=device)
        with run.plain():
            run.engine.evaluate(run.batch(0).select(first_row))
        # Before anything of full size has run: what is composed below comes on top of it.
        process, so_far = in_use_bytes(run.device), peak_bytes(run.device)
        room = free_bytes(run.device)
        parts = (estimate, run.engine.params, run.optimizer)
        taken = counted(*parts, device, isinstance(home, Offload) and home.apart)
        speed = timed(*parts, device=device)
    evaluation = _evaluation(run, device)
    weights, elsewhere = weights_bytes(run.model), 0
    optimizer, top = taken.optimizer, max(taken.peak, evaluation)
    facts: dict[str, Any] = {"rung": choice.rung, "reason": choice.reason}
    if isinstance(home, Offload) and not home.on_host(device):
        elsewhere = home.bytes + optimizer
        weights, optimizer = weights - home.bytes, 0
        if home.folder is not None and device.type == "cpu":
            # Pages of the files are not the process's own.
            process, so_far = private_bytes(), home.before
    room = None if room is None else process + room
    needed = max(so_far, process + optimizer + top)
    facts |= {
        "memory_bytes": needed,
        "memory_parts": {
            "process": max(0, process - weights),
            "weights": weights,
            "optimizer": optimizer,
            "estimate": taken.estimate,
            "update": taken.held + taken.update,
            "evaluation": evaluation,
        },
        "memory_room_bytes": room,
        "fits": room is None or needed <= room,
        "device": run.device,
        "offload": run.offload,
        "offloaded_bytes": elsewhere,
    }
    if run.offload is None:
        facts["with_offload_bytes"] = process - weights + _with_offload(run, taken, evaluation)
    return facts | {
        "queries_per_second": speed,
        "queries_per_step": run._cost(first),
        "rows": run.batch_size,
        "directions": plan.directions,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "trainable": sum(p.numel() for p in run.engine.params.values()),
        "steps": run._planned(),
    }


def _evaluation(run: Trainer, device: torch.device) -> int:
    """Bytes of the pass over a batch of evaluation rows, from passes over few of them."""
    dataset = run.data.evaluation
    if dataset is None or not len(dataset):
        return 0
    rows = min(run.evaluation_batch_size, len(dataset))

    def passed(count: int) -> object:
        return run.engine.evaluate(dataset.batch(torch.arange(count) % rows).to(device))

    with run.plain():
        return footprint(passed, device).bytes(rows)


def _with_offload(run: Trainer, taken: Step, evaluation: int) -> int:
    """At the peak of a run that is not offloaded, if it were: beside what lies elsewhere."""
    if torch.device(run.device).type == "cpu":
        # Weights are used where they are mapped.
        return max(taken.peak, evaluation)
    largest = max(value.nbytes for value in run.model.parameters())
    trained = sum(value.nbytes for value in run.engine.params.values())
    kept = taken.optimizer * largest // trained
    return max(
        2 * largest + max(taken.estimate, evaluation), taken.held + taken.update + largest + kept
    )


def counted(
    estimate: Callable[[], Estimate],
    params: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    brought: bool = False,
) -> Step:
    """Counts the live tensors of one step on `device`.

    Args:
        brought: whether a parameter, and what the optimizer keeps of it, are there for its update
            alone.
    """

    def rehearsed(name: str) -> int:
        # What is kept from one gradient for the next is no part of the twin.
        before = live.now
        with _twin(optimizer, params[name], device) as (twin, probe):
            beside, start = 0 if brought else live.now - before, len(live.moments)
            _update(twin, probe, made.grad, name)
        return max(live.moments[start:]) - beside

    with torch.no_grad(), LiveBytes(device) as live:
        made = estimate()
        peak, held = live.peak, live.now
        # In a function of its own, so that no twin is there beside the next.
        update = max(map(rehearsed, params)) - held
    return Step(peak, held, update, optimizer_bytes(optimizer))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimizer keeps from step to step, beside the weights."""
    total = 0
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        with torch.no_grad(), _twin(optimizer, parameter, parameter.device) as (twin, probe):
            kept = (value for value in twin.state[probe].values() if isinstance(value, Tensor))
            total += sum(value.numel() * value.element_size() for value in kept)
    return total


def timed(
    estimate: Callable[[], Estimate],
    params: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    seconds: float = 1.0,
    device: torch.device | None = None,
) -> float:
    """Queries a second of whole steps, over two steps and as many more as take so long."""
    queries, spent, steps = 0, 0.0, 0
    with torch.no_grad():
        while steps < 2 or spent < seconds:
            started = time.monotonic()
            made = estimate()
            float(made.loss)
            spent += time.monotonic() - started
            for name, parameter in params.items():
                with _twin(optimizer, parameter, device or parameter.device) as (twin, probe):
                    started = time.monotonic()
                    _update(twin, probe, made.grad, name)
                    spent += time.monotonic() - started
            queries += made.queries
            steps += 1
    return queries / spent


def _update(
    twin: torch.optim.Optimizer, probe: nn.Parameter, gradient: Mapping[str, Tensor], name: str
) -> None:
    with handed(twin, gradient, name, probe) as square:
        square.item()
        twin.step()


@contextmanager
def _twin(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, device: torch.device
) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter]]:
    """The optimizer after a step, with a copy of `parameter` in its place, and that copy."""
    probe = nn.Parameter(parameter.detach().to(device, copy=True))
    probe.grad = torch.zeros_like(probe)
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [
        {**group, "params": [probe if one is parameter else one for one in group["params"]]}
        for group in optimizer.param_groups
    ]
    # A schedule has wrapped the step of the original; the class's own knows nothing of it.
    twin.step = type(twin).step.__get__(twin)  # type: ignore[method-assign]
    twin.step()
    probe.grad = None
    try:
        yield twin, probe
    finally:
        # Its step holds it, so that it goes when it likes; what it holds goes now.
        twin.state.clear()
        twin.param_groups = []
