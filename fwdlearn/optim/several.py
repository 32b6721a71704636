"""Optimizers of different kinds as one: some parameters go with each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fwdlearn.errors import UsageError


class Several(torch.optim.Optimizer):
    """Optimizers of different kinds as one, so that schedules, snapshots and trainers see one.

    Groups and state lie here, in the order of the optimizers; each of them does the steps of its
    own groups.

    Args:
        optimizers: at least one, not used yet, no parameter in two of them.

    Raises:
        UsageError: a parameter is in two optimizers, or there is none.

    Example:
        >>> weight, bias = (torch.nn.Parameter(torch.zeros(n)) for n in ((2, 2), 2))
        >>> parts = [torch.optim.Muon([weight], lr=0.1), torch.optim.SGD([bias], lr=1.0)]
        >>> [group["lr"] for group in Several(parts).param_groups]
        [0.1, 1.0]
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not optimizers:
            raise UsageError("Several(optimizers=...) needs one at least.")
        groups = [group for one in optimizers for group in one.param_groups]
        held = [id(parameter) for group in groups for parameter in group["params"]]
        if len(set(held)) < len(held):
            raise UsageError("Several(optimizers=...) must not hold a parameter twice.")
        self.optimizers = tuple(optimizers)
        self.counts = [len(one.param_groups) for one in optimizers]
        super().__init__(groups, {})

    def __getstate__(self) -> dict[str, Any]:
        """torch's own names what a copy takes; this one has more."""
        own = {"optimizers": self.optimizers, "counts": self.counts}
        return {**super().__getstate__(), **own}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for one, count in zip(self.optimizers, self.counts, strict=True):
            # What was loaded lies here, and so does what comes of the step.
            one.param_groups, one.state = self.param_groups[start : start + count], self.state
            one.step()
            start += count
        return loss
