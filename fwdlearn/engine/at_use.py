"""Perturbed parameters that are formed where an operation takes them.

A perturbed copy of a whole model takes as much memory as the model. Its large tensors can be had
one at a time instead: a torch function mode puts the perturbed tensor in the place of the
parameter, operation by operation. What these put out are ordinary tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fwdlearn.engine.fold import replaced
from fwdlearn.engine.trace import tensors

SIZES = {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size"}
SIZES |= {"is_floating_point", "is_complex", "is_inference"}
"""Functions that read of a parameter what is the same of anything in its place."""


class AtUse(TorchFunctionMode):
    """Within, operations see other tensors in the place of some parameters.

    Args:
        params: name -> parameter.
        form: name -> what to use for it; the last one is kept until the next is asked for.

    Attributes:
        missed: names that no operation has taken so far.
    """

    def __init__(self, params: Mapping[str, Tensor], form: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in params.items()}
        self.form, self.missed = form, set(params)
        self._last: tuple[str, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(id(t) in self.names for t in tensors((args, kwargs))):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in SIZES or name == "__get__":
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor):
                return found
        return func(*replaced(args, self._seen), **replaced(kwargs, self._seen))

    def _seen(self, value: Tensor) -> Tensor:
        name = self.names.get(id(value))
        if name is None:
            return value
        self.missed.discard(name)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.form(name)
        return self._last[1]
