"""Modules that torch runs as one operation where nobody looks on: their weights come all at once.

torch's transformer layers take a path of their own unless a torch function mode is active. Rounding
differs between the two, so where the mode that brings weights is the only one, it steps aside for
the time of such a module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily


class Unit:
    """A module whose weights are there while it runs.

    Args:
        module: the module.
        mode: brings weights to operations, and steps aside.
        params: its parameters.
    """

    def __init__(self, module: nn.Module, mode: Any, params: Sequence[nn.Parameter]) -> None:
        self.module, self.mode, self.params = module, mode, params

    def __enter__(self) -> None:
        own = self.module.__dict__
        self._before = own.get("forward")
        forward = self.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._present():
                return forward(*args, **kwargs)

        own["forward"] = run

    def __exit__(self, *error: object) -> None:
        own = self.module.__dict__
        own.pop("forward", None)
        if self._before is not None:
            own["forward"] = self._before

    @contextmanager
    def _present(self) -> Iterator[None]:
        depth = torch._C._len_torch_function_stack()
        mode: TorchFunctionMode | None = torch._C._get_function_stack_at(0) if depth == 1 else None
        if depth > 1 or (depth == 1 and mode is not self.mode):
            # Operations are looked at anyway, and weights come to each of them.
            yield
            return
        with nullcontext() if depth == 0 else _pop_mode_temporarily():
            before = [parameter.data for parameter in self.params]
            copies = self.mode.window.take({id(parameter): parameter for parameter in self.params})
            for parameter in self.params:
                parameter.data = copies[id(parameter)]
            try:
                yield
            finally:
                for parameter, value in zip(self.params, before, strict=True):
                    parameter.data = value


def whole_units(model: nn.Module, mode: Any, hosts: Mapping[int, Tensor]) -> tuple[Unit, ...]:
    """The units of a model."""
    units: dict[nn.Module, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # It looks at its layers' weights, and uses none itself.
            units[module] = []
            for part in (*module.layers, module.norm):
                if part is not None:
                    units[part] = list(part.parameters())
        elif isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention):
            units[module] = list(module.parameters())
    return tuple(Unit(module, mode, params) for module, params in units.items())
