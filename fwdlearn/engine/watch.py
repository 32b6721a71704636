"""How the fold gets to see the operations on parameters: two ways, the cheap one first.

`by_type` hands the model tensors of a class of their own in place of its parameters, for the time
of a pass. Only what touches them leaves the fast path; the rest of the model runs as if nothing
were there. A model that keeps its parameters elsewhere than torch does (`nn.GRU` has a list beside
them) is watched `by_mode`, which sees every operation and costs a few microseconds for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fwdlearn.engine.fold import Fold, Rule
from fwdlearn.engine.offload import is_offloaded
from fwdlearn.engine.queries import Queries
from fwdlearn.engine.trace import Use

Start = Callable[[Queries], AbstractContextManager[Fold]]
Watch = Callable[
    [nn.Module, Mapping[str, Tensor], Sequence[Use], Mapping[Any, Rule]],
    AbstractContextManager[Start],
]

_running: ContextVar[Fold] = ContextVar("_running")


def ways(params: Mapping[str, Tensor]) -> tuple[Watch, ...]:
    """The ways to watch parameters, the cheap one first where it can be tried."""
    plain = all(type(value) in (Tensor, nn.Parameter) for value in params.values())
    # Tensors that share the storage of parameters do so only where these lie on the device.
    if plain and not any(is_offloaded(value) for value in params.values()):
        return by_type, by_mode
    return (by_mode,)


class _Watched(Tensor):
    """A tensor whose operations are handed to the fold that is running."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fold = _running.get()
        if (inside := fold.opened(func)) is not None:
            return inside(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return fold.run(func, args, kwargs)


@contextmanager
def by_type(
    model: nn.Module,
    params: Mapping[str, Tensor],
    uses: Sequence[Use],
    rules: Mapping[Any, Rule],
) -> Iterator[Start]:
    """Within, the model holds watched tensors that share the storage of its parameters.

    Yields:
        What makes the fold of a block of queries, for the time of its pass.
    """
    watched = {
        id(value): Tensor._make_subclass(_Watched, value.detach()) for value in params.values()
    }
    names = {id(watched[id(value)]): name for name, value in params.items()}
    places = [
        (module._parameters, name, value)
        for module in model.modules()
        for name, value in module._parameters.items()
        if id(value) in watched
    ]

    @contextmanager
    def start(queries: Queries) -> Iterator[Fold]:
        fold = Fold(names, uses, rules, queries, _Watched)
        token = _running.set(fold)
        try:
            yield fold
        finally:
            _running.reset(token)

    try:
        for holder, name, value in places:
            holder[name] = watched[id(value)]  # type: ignore[assignment]
        yield start
    finally:
        for holder, name, value in places:
            holder[name] = value


@contextmanager
def by_mode(
    model: nn.Module,
    params: Mapping[str, Tensor],
    uses: Sequence[Use],
    rules: Mapping[Any, Rule],
) -> Iterator[Start]:
    """The same for a model as it is: every operation is looked at.

    Yields:
        What makes the fold of a block of queries, for the time of its pass.
    """
    names = {id(value): name for name, value in params.items()}

    @contextmanager
    def start(queries: Queries) -> Iterator[Fold]:
        fold = Fold(names, uses, rules, queries)
        with _Mode(fold):
            yield fold

    yield start


class _Mode(TorchFunctionMode):
    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.fold = fold

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fold = self.fold
        if not fold.takes(args, kwargs):
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if (inside := fold.opened(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        return fold.run(func, args, kwargs)
