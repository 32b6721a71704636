"""An optimizer's step on one parameter: its gradient is alive for that time and no longer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fwdlearn.gradient import DirectionGradient, squared, update_of


@contextmanager
def handed(
    optimizer: Optimizer, gradient: Mapping[str, Tensor], name: str, parameter: nn.Parameter
) -> Iterator[Tensor]:
    """Within, the optimizer's step is one on this parameter.

    Of a table of which a batch reads some entries (`ReadParams`), plain gradient descent changes
    these alone; it is handed them in the place of the table. What would change the others too,
    decay or momentum, is handed all of it, with zeros.

    Args:
        gradient: of `name` among others.
        name: of the parameter.
        parameter: held by the optimizer.

    Yields:
        The squared norm of the gradient.
    """
    group, place = _place(optimizer, parameter)
    if not (_plain(optimizer, group) and _is_read(gradient, name)):
        parameter.grad, square = update_of(gradient, name, parameter)
        try:
            yield square
        finally:
            parameter.grad = None
        return
    assert isinstance(gradient, DirectionGradient)
    entries, grad = gradient.read(name)
    some = nn.Parameter(parameter[entries])
    some.grad = grad.to(parameter.dtype)
    group["params"][place] = some
    try:
        yield squared(grad)
    finally:
        group["params"][place] = parameter
    parameter.index_copy_(0, entries, some)


def _place(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[dict[str, Any], int]:
    """The group that holds a parameter, and where in it."""
    for group in optimizer.param_groups:
        for place, one in enumerate(group["params"]):
            if one is parameter:
                return group, place
    raise AssertionError("the optimizer was asked for its parameters when the trainer was made")


def _plain(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a step changes nothing where the gradient is zero, and keeps nothing of it."""
    return type(optimizer) is SGD and group["momentum"] == 0 and group["weight_decay"] == 0


def _is_read(gradient: Mapping[str, Tensor], name: str) -> bool:
    return isinstance(gradient, DirectionGradient) and name in gradient.directions.entries
