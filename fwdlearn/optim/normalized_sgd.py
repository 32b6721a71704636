"""Gradient descent whose steps are divided by the spread of the losses (FZOO).

Paper: S. Dang et al., "FZOO: Fast zeroth-order optimizer for fine-tuning large language models
towards Adam-scale speed" (ICLR 2026).

Update for a gradient g = 1/n sum_i s_i z_i along n directions z with slopes s of the batch's loss:

    theta <- theta - lr * g / std(s)

Symbols: std(s) `spread`, with n - 1 in its denominator.

Noise along n directions in d numbers has |g|^2 about d / n times mean s^2, so a step is about
lr * sqrt(d / n) long however steep the loss is: this is normalised gradient descent, and the norm
costs no pass over the weights, because the n slopes tell it.

Differs from the paper in: slopes in place of losses, which are sigma times as large, so that lr
does not depend on sigma; any estimator whose gradient is a sum of random directions, and private
ones too, whose slopes are those of their rows; momentum. The spread is worked out from the
coefficients, which are all that a ledger keeps of a step, so that a run is rebuilt from it without
passes.

Cost: none; a tensor a parameter with momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from fwdlearn.errors import UsageError


class NormalizedSGD(torch.optim.Optimizer):
    """Gradient descent whose steps are divided by the spread of the losses (FZOO).

    Args:
        params: parameters or groups.
        lr: positive.
        momentum: in [0, 1); of the divided gradients.
        weight_decay: decoupled, at least 0.
        spread: what gradients are divided by; None for what the trainer finds.

    Raises:
        ValueError: a setting is out of range.
        UsageError: a step without a trainer and without a spread.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = NormalizedSGD([weight], lr=0.1, spread=4.0)
        >>> weight.grad = torch.tensor([4.0, -8.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.1000,  0.2000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        spread: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "spread": spread,
        }
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum, spread = group["lr"], group["momentum"], group["spread"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if spread is None:
                    raise UsageError(
                        "NormalizedSGD(spread=None) is told the spread by a trainer; give it a "
                        "number where there is none."
                    )
                # Without a spread there is no slope either, and so no step.
                step = parameter.grad / spread if spread else torch.zeros_like(parameter.grad)
                if momentum:
                    kept = self.state[parameter].get("momentum")
                    step = step if kept is None else kept.mul_(momentum).add_(step)
                    self.state[parameter]["momentum"] = step
                if group["weight_decay"]:
                    parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(step, alpha=-lr)
        return loss


def _check(settings: dict[str, Any]) -> None:
    rules = {
        "lr": (settings["lr"] > 0, "positive"),
        "momentum": (0 <= settings["momentum"] < 1, "in [0, 1)"),
        "weight_decay": (settings["weight_decay"] >= 0, "at least 0"),
        "spread": (settings["spread"] is None or settings["spread"] >= 0, "at least 0, or None"),
    }
    for name, (kept, rule) in rules.items():
        if not kept:
            raise ValueError(f"NormalizedSGD({name}=...) must be {rule}, got {settings[name]!r}.")
