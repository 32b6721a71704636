"""Frank-Wolfe with averaged gradients: constrained training from noisy forward gradients.

Papers: M. Rostami and S. Kia, "Projected forward gradient-guided Frank-Wolfe algorithm via
variance reduction" (arXiv 2403.12511), forward gradients as the oracle; A. Mokhtari, H. Hassani
and A. Karbasi, "Stochastic conditional gradient methods" (arXiv 1804.09554), averaging; A. Sahu,
M. Zaheer and S. Kar, "Towards gradient free and projection free stochastic optimization" (arXiv
1810.03233), its weight for gradients along random directions; M. Jaggi, "Revisiting Frank-Wolfe"
(ICML 2013), the gap.

Update at step k = 0, 1, ..., for the gradient g_k that `.grad` holds:

    average_k = (1 - rho_k) average_{k-1} + rho_k g_k,        average_{-1} = 0
    vertex    = argmin over s in the set of <s, average_k>
    theta    <- (1 - gamma_k) theta + gamma_k vertex

    rho_k   = min(1, 4 / (k + 8)^(2/3))                       averaging="classical"
            = min(1, 4 / ((1 + d/m)^(1/3) (k + 8)^(2/3)))     averaging="dimension"
            = 1                                               averaging=None
    gamma_k = 2 / (k + 8)

Symbols: theta the parameters, d `dimension`, m `tangents`, rho `averaging`, gamma `step_size`.

Why average: the vertex depends on the direction of the gradient alone, so noise proportional to the
gradient never dies away. On an l1 ball with one tangent, the plain method goes to the vertex of the
tangent's largest entry: pure chance, whatever the gradient (with Rademacher tangents all entries
tie, and it is always the first). It stalls.

Differs from the papers in: any number of tensors, each in its own set, with its own step counter;
rounding is guarded against, so that every iterate is feasible in float32 too.

Cost: one tensor a parameter for the average (none without), and what the set's oracle takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fwdlearn.errors import NonFiniteError, UsageError
from fwdlearn.optim.sets import ConstraintSet, Product, Vertex


class FrankWolfe(torch.optim.Optimizer):
    """Frank-Wolfe with averaged gradients: weights that never leave their constraint set.

    Args:
        params: parameters or groups, float32 or float64. One that lies outside its set is moved
            to the set's `project` of it at once, so that the first gradient is taken inside.
        set: the constraint set of each tensor, or a `Product` with one set a tensor. Groups may
            have their own.
        lr: factor on the step size, positive; what schedules change. Steps are cut at 1.
        averaging: the weight of a new gradient: "dimension", "classical", a constant in (0, 1],
            or None to use each gradient alone (right for exact gradients only).
        step_size: a constant gamma in (0, 1], or None for 2 / (k + delay).
        delay: at least 2; the textbook's step for exact gradients has 2.
        tangents: m, directions that a gradient is the mean of, at least 1; None for what the
            trainer finds, or 1 without one. With private directions and rows that agree, these are
            all (row, direction) pairs.
        dimension: d, how many numbers a direction has; those of all parameters when not given.

    Attributes:
        gap: the Frank-Wolfe gap <average, theta - vertex> of the last steps, summed over the
            tensors that have moved. Where gradients are exact and nothing is averaged it bounds
            f - f* for convex f; with noise it estimates that bound, from above in the mean.

    Raises:
        ValueError: a setting is out of range.
        UsageError: a set that couples tensors, a dtype of low precision, or a state that was saved
            with another set.

    Example:
        >>> from fwdlearn.optim.sets import L1Ball
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = FrankWolfe([weight], set=L1Ball(8.0))
        >>> weight.grad = torch.tensor([1.0, -4.0, 2.0])
        >>> optimizer.step()
        >>> weight.data, round(optimizer.gap, 4)
        (tensor([0., 2., 0.]), 32.0)
    """

    def __init__(
        self,
        params: ParamsT,
        set: ConstraintSet | Product,
        lr: float = 1.0,
        averaging: Literal["dimension", "classical"] | float | None = "dimension",
        step_size: float | None = None,
        delay: float = 8.0,
        tangents: int | None = None,
        dimension: int | None = None,
    ) -> None:
        defaults = {
            "set": set,
            "lr": lr,
            "averaging": averaging,
            "step_size": step_size,
            "delay": delay,
            "tangents": tangents,
            "dimension": dimension,
        }
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_tensors(group)
        with torch.no_grad():
            for parameter, region in _pairs(group):
                _enter(parameter, region)

    @property
    def gap(self) -> float:
        gaps = [state["gap"] for state in self.state.values()]
        return math.fsum(gaps) if gaps else math.nan

    @property
    def info(self) -> dict[str, float]:
        """What a trainer's records say of it."""
        return {"gap": self.gap}

    @torch.no_grad()
    def true_gap(self) -> float:
        """The Frank-Wolfe gap at the gradients that the parameters hold now, nothing averaged.

        Where they are exact it bounds f - f* for convex f, and is 0 at stationary points alone;
        where they are means of many tangents it estimates that.
        """
        return math.fsum(
            _oracle(parameter.grad.contiguous(), parameter, region)[1]
            for group in self.param_groups
            for parameter, region in _pairs(group)
            if parameter.grad is not None
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient; each counts its own steps."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter, region in _pairs(group):
                if parameter.grad is not None:
                    self._move(parameter, region, group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with the sets as text."""
        saved = super().state_dict()
        groups = [{**group, "set": repr(group["set"])} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues bit for bit where the state was saved, with the same weights and sets."""
        groups = []
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if saved["set"] != repr(group["set"]):
                raise UsageError(
                    f"FrankWolfe: the state was saved with {saved['set']} and the optimizer has "
                    f"{group['set']!r}, which may not hold its weights; make it with the saved set."
                )
            groups.append({**saved, "set": group["set"]})
        groups += state_dict["param_groups"][len(groups) :]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def _move(self, parameter: Tensor, region: ConstraintSet, group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        state, direction = self.state[parameter], parameter.grad.contiguous()
        if not state:
            state.update(step=0, gap=math.nan, excess=_enter(parameter, region), unseen=1.0)
        weight = self._weight(state["step"], group)
        if group["averaging"] is not None:
            if "average" not in state:
                state["average"] = torch.zeros_like(direction)
            direction = state["average"].lerp_(direction, weight)
        state["unseen"] *= 1 - weight
        point = parameter.contiguous()
        vertex, gap = _oracle(direction, point, region)
        # The average of few gradients is short, because it starts from zero; the gap is not.
        state["gap"] = gap / (1 - state["unseen"])
        pace = group["step_size"] or 2 / (state["step"] + group["delay"])
        rate = min(1.0, group["lr"] * pace)
        vertex.pull(point, rate)
        # Excess is convex and at most 0 at the vertex, so this bounds it at no cost.
        excess = (1 - rate) * state["excess"] + region.rounding(point)
        state["excess"] = region.settle(point) if excess > 0 else excess
        state["step"] += 1
        if point is not parameter:
            parameter.copy_(point)

    def _weight(self, step: int, group: Mapping[str, Any]) -> float:
        """rho of the update."""
        averaging, spread = group["averaging"], 1.0
        if averaging is None:
            return 1.0
        if not isinstance(averaging, str):
            return float(averaging)
        if averaging == "dimension":
            dimension = group["dimension"] or sum(
                parameter.numel() for each in self.param_groups for parameter in each["params"]
            )
            spread = 1 + dimension / (group["tangents"] or 1)
        return min(1.0, 4 / (spread ** (1 / 3) * (step + 8) ** (2 / 3)))


def _pairs(group: Mapping[str, Any]) -> Iterator[tuple[Tensor, ConstraintSet]]:
    """Each parameter with its set."""
    params, region = group["params"], group["set"]
    regions = region.sets if isinstance(region, Product) else (region,) * len(params)
    return zip(params, regions, strict=True)


def _enter(parameter: Tensor, region: ConstraintSet) -> float:
    """Moves a parameter into its set where it lies outside; returns a bound of its excess."""
    # What is inside up to rounding stays as it is: it may have been saved on the way.
    if region.contains(parameter):
        return region.excess(parameter)
    parameter.copy_(region.project(parameter))
    return region.settle(parameter)


def _oracle(direction: Tensor, point: Tensor, region: ConstraintSet) -> tuple[Vertex, float]:
    """The vertex, and the gap <direction, point - vertex>."""
    here = float(torch.dot(direction.reshape(-1), point.reshape(-1)))
    if not math.isfinite(here):
        raise NonFiniteError(
            f"FrankWolfe: the gradient of a parameter of shape {tuple(point.shape)} is not finite."
        )
    vertex = region.vertex(direction)
    return vertex, here - float(vertex.dot(direction))


def _check(group: Mapping[str, Any]) -> None:
    """Raises unless all settings are in range."""
    region = group["set"]
    if not isinstance(region, ConstraintSet | Product):
        raise UsageError(
            "FrankWolfe(set=...) must be a constraint set of fwdlearn.optim.sets, such as "
            f"L1Ball(30.0), got {region!r}."
        )
    if isinstance(region, ConstraintSet) and region.couples:
        raise UsageError(
            f"FrankWolfe(set=...) cannot be {type(region).__name__}: it couples tensors, and "
            "tensors are updated one at a time; give each its own set (parameter groups or "
            "Product), or hold the weights in one tensor."
        )
    averaging = group["averaging"]
    rules = {
        "lr": ("positive", group["lr"] > 0),
        "averaging": (
            "'dimension', 'classical', a constant in (0, 1] or None",
            averaging in ("dimension", "classical")
            if isinstance(averaging, str)
            else averaging is None or 0 < averaging <= 1,
        ),
        "step_size": (
            "in (0, 1], or None for 2 / (k + delay)",
            group["step_size"] is None or 0 < group["step_size"] <= 1,
        ),
        "delay": ("at least 2", group["delay"] >= 2),
        "tangents": ("at least 1", group["tangents"] is None or group["tangents"] >= 1),
        "dimension": ("at least 1", group["dimension"] is None or group["dimension"] >= 1),
    }
    for name, (rule, holds) in rules.items():
        if not holds:
            raise ValueError(f"FrankWolfe({name}=...) must be {rule}, got {group[name]!r}.")


def _check_tensors(group: Mapping[str, Any]) -> None:
    """Raises unless the set fits the parameters."""
    parameters, region = group["params"], group["set"]
    if isinstance(region, Product) and len(region.sets) != len(parameters):
        raise UsageError(
            f"FrankWolfe(set=...) is a Product of {len(region.sets)} sets, and its group has "
            f"{len(parameters)} parameters; give one set a parameter."
        )
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"FrankWolfe needs weights in float32 or float64, got {parameter.dtype}, where "
                "short steps are lost to rounding; convert the model with model.float()."
            )
