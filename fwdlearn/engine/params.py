"""The trainable parameters of a model under names that do not depend on how it was built."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fwdlearn.errors import UsageError


def trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Parameters that require a gradient, sorted by name.

    A tied parameter appears once, under the first of its names in alphabetical order, so that
    neither the order of registration nor that of tying changes what a direction is.

    Raises:
        UsageError: nothing is trainable, or a trainable parameter is not floating point.
    """
    names: dict[int, str] = {}
    by_id: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names[id(parameter)] = min(name, names.get(id(parameter), name))
            by_id[id(parameter)] = parameter
    if not names:
        raise UsageError(
            f"{type(model).__name__} has no trainable parameter; set requires_grad on those "
            "that training may change."
        )
    for key, parameter in by_id.items():
        if not parameter.is_floating_point():
            raise UsageError(
                f"{names[key]} is {parameter.dtype}: only floating-point parameters can be "
                "trained; set its requires_grad to False."
            )
    return {name: by_id[key] for key, name in sorted(names.items(), key=lambda item: item[1])}
