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

import torch
from torch import Tensor, nn

from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.estimator import Estimate
from fwdlearn.update import handed


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


def counted(
    estimate: Callable[[], Estimate],
    params: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Step:
    """Counts the live tensors of one step on `device`."""
    update = 0
    with torch.no_grad(), LiveBytes(device) as live:
        made = estimate()
        peak, held = live.peak, live.now
        for name, parameter in params.items():
            # What is kept from one gradient for the next is no part of the twin.
            before = live.now
            with _twin(optimizer, parameter) as (twin, probe):
                beside, start = live.now - before, len(live.moments)
                _update(twin, probe, made.grad, name)
            update = max(update, max(live.moments[start:]) - beside - held)
    return Step(peak, held, update, optimizer_bytes(optimizer))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimizer keeps from step to step, beside the weights."""
    total = 0
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        with torch.no_grad(), _twin(optimizer, parameter) as (twin, probe):
            kept = (value for value in twin.state[probe].values() if isinstance(value, Tensor))
            total += sum(value.numel() * value.element_size() for value in kept)
    return total


def timed(
    estimate: Callable[[], Estimate],
    params: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    seconds: float = 1.0,
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
                with _twin(optimizer, parameter) as (twin, probe):
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
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter]]:
    """The optimizer after a step, with a copy of `parameter` in its place, and that copy."""
    probe = nn.Parameter(parameter.detach().clone())
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
    yield twin, probe
