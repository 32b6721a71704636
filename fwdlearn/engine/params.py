"""The trainable parameters of a model under names that do not depend on how it was built."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fwdlearn.engine.quantized import is_quantized, quantized_layers
from fwdlearn.errors import UsageError

_NO_UPDATE = (
    "no update can be written into its few bits: set its requires_grad to False and train an "
    "adapter, biases, norms or scales in floating point. Losses along the matrix itself: "
    "Engine(model, objective, virtual=[...])."
)


def trainable(model: nn.Module, required: bool = True) -> Mapping[str, nn.Parameter]:
    """Parameters that require a gradient, sorted by name.

    A tied parameter appears once, under the first of its names in alphabetical order, so that
    neither the order of registration nor that of tying changes what a direction is.

    Raises:
        UsageError: nothing is trainable (unless it is not `required`), or a trainable parameter is
            not floating point of 16 bits up.
    """
    names: dict[int, str] = {}
    by_id: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names[id(parameter)] = min(name, names.get(id(parameter), name))
            by_id[id(parameter)] = parameter
    if required and not names:
        quantized = next(iter(quantized_layers(model)), None)
        raise UsageError(
            f"{type(model).__name__} has no trainable parameter; set requires_grad on those "
            "that training may change"
            + (f". {quantized} is quantised, and {_NO_UPDATE}" if quantized else ".")
        )
    for key, parameter in by_id.items():
        if not parameter.is_floating_point():
            raise UsageError(
                f"{names[key]} is {parameter.dtype}: only floating-point parameters can be "
                "trained; set its requires_grad to False."
            )
        if is_quantized(parameter):
            raise UsageError(f"{names[key]} requires a gradient but is quantised: {_NO_UPDATE}")
    return {name: by_id[key] for key, name in sorted(names.items(), key=lambda item: item[1])}


def in_place(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `functional_call` shall put in the place of tensors, without tying of its own.

    A tied tensor is in several modules and has a name in each. A module with several names is one
    place all the same: torch's tying would replace it there for each of them, and then put the
    replacement back in the place of the parameter.

    Args:
        values: name of a parameter or buffer -> what to use for it.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    wanted = {id(tensors[name]): value for name, value in values.items()}
    return {
        f"{prefix}.{name}" if prefix else name: wanted[id(tensor)]
        for prefix, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if id(tensor) in wanted
    }


def read_only(params: Mapping[str, Tensor]) -> list[str]:
    """Names of parameters in memory that this process must not write, where the system tells.

    Weights mapped from a file may lie there. Losses never write; an update would end the process
    without a word. Only Linux tells; elsewhere the list is empty.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    fields = (line.split(maxsplit=2) for line in lines)
    spans = [span.split("-") for span, access, _ in fields if "w" not in access]
    starts, ends = ([int(span[side], 16) for span in spans] for side in (0, 1))
    names = []
    for name, value in params.items():
        if value.device.type == "cpu" and type(value) in (Tensor, nn.Parameter):
            place = bisect(starts, value.data_ptr()) - 1
            if place >= 0 and value.data_ptr() < ends[place]:
                names.append(name)
    return names
