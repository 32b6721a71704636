"""What no perturbation reaches runs once a row: frozen layers at the start of a model.

All queries of a row look the same until the first trainable parameter. A module without one that
is done before that point needs to see each row once, however many queries the row has; its
results are handed out to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fwdlearn.engine.fold import replaced
from fwdlearn.engine.queries import Queries
from fwdlearn.engine.trace import Profile, Recorder, Rows, TraceError, rows_of, tensors

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Still:
    """A module to be run once a row.

    Args:
        module: holds no trainable parameter, and runs before any.
        inputs: for each tensor among its arguments, in order: where the rows lie, or None.
        outputs: the same for its results.
    """

    module: nn.Module
    inputs: tuple[Rows | None, ...]
    outputs: tuple[Rows | None, ...]


@dataclass(frozen=True)
class _Visit:
    inputs: tuple[Profile, ...]
    outputs: tuple[Profile, ...]
    early: bool


class Visits:
    """The calls of every frozen module in one traced pass.

    Args:
        model: the model.
        trainable: ids of its trainable parameters.
        recorder: records the pass; tells whether a trainable parameter has been used.
    """

    def __init__(self, model: nn.Module, trainable: Mapping[int, str], recorder: Recorder) -> None:
        self.recorder = recorder
        self.modules = [
            module
            for module in model.modules()
            if not any(id(value) in trainable for value in module.parameters())
        ]
        self.seen: dict[nn.Module, list[_Visit | None]] = {module: [] for module in self.modules}

    def __enter__(self) -> Visits:
        hook = self._hook
        self._handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self.modules]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        visit = None
        if _simple((args, kwargs)) and _simple(output):
            # Out of sight of the recorder.
            with torch._C.DisableTorchFunction():
                before, after = (
                    tuple(Profile.of(value) for value in tensors(group))
                    for group in ((args, kwargs), output)
                )
            visit = _Visit(before, after, not self.recorder.seen)
        self.seen[module].append(visit)


def stills(two: Visits, three: Visits) -> tuple[Still, ...]:
    """The modules that can run once a row, from passes on two rows and on three."""
    found: list[Still] = []
    inside: set[nn.Module] = set()
    # Parents come before their children, and stand for them.
    for module in two.modules:
        if module in inside or not _is_still(two.seen[module], three.seen[module]):
            continue
        a, b = two.seen[module][0], three.seen[module][0]
        assert a is not None and b is not None
        try:
            inputs = tuple(rows_of(*pair) for pair in zip(a.inputs, b.inputs, strict=True))
            outputs = tuple(rows_of(*pair) for pair in zip(a.outputs, b.outputs, strict=True))
        except (TraceError, ValueError):
            continue
        if any(rows is not None for rows in inputs):
            found.append(Still(module, inputs, outputs))
            inside.update(module.modules())
    return tuple(found)


@contextmanager
def once(still: Sequence[Still], queries: Queries) -> Iterator[None]:
    """Within, the modules see each row of the queries once, where that saves something."""
    if not still or queries.repeats is None or queries.dropout is not None:
        yield
        return
    kept = [(one.module, one.module.__dict__.get("forward")) for one in still]
    try:
        for one in still:
            one.module.__dict__["forward"] = _narrowed(one, one.module.forward, queries)
        yield
    finally:
        for module, own in kept:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


def _narrowed(still: Still, forward: Callable[..., Any], queries: Queries) -> Callable[..., Any]:
    repeats, count = queries.repeats, len(queries)
    assert repeats is not None

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(list(tensors((args, kwargs)))) != len(still.inputs):
            # Another path through the model, such as a mask that this batch needs: all queries.
            return forward(*args, **kwargs)
        rows = iter(still.inputs)

        def narrow(value: Tensor) -> Tensor:
            where = next(rows)
            return value if where is None else where.last(where.first(value, count)[repeats.first])

        output = forward(*replaced(args, narrow), **replaced(kwargs, narrow))
        where_out = iter(still.outputs)

        def widen(value: Tensor) -> Tensor:
            where = next(where_out)
            if where is None:
                return value
            return where.last(where.first(value, len(repeats.first))[repeats.inverse])

        return replaced(output, widen)

    return run


def _is_still(two: Sequence[_Visit | None], three: Sequence[_Visit | None]) -> bool:
    if len(two) != 1 or len(three) != 1 or two[0] is None or three[0] is None:
        return False
    return two[0].early and three[0].early


def _simple(value: Any) -> bool:
    """Whether there is nothing but tensors and plain values in it: a cache would be mutated."""
    if isinstance(value, (Tensor, *_PLAIN)):
        return True
    if type(value) in (tuple, list):
        return all(_simple(item) for item in value)
    return type(value) is dict and all(_simple(item) for item in value.values())
