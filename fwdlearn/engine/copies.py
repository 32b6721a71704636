"""Many perturbed copies of the parameters at once, by `vmap` over one model.

For models that the fold cannot follow: the model itself runs, on a stack of copies. Queries at
one point share a copy, and copies with equally many rows share a pass. What it costs is the
memory of the copies, which bounds how many there are; from the size of a cache on, running them
one after the other is no slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fwdlearn.batch import Batch
from fwdlearn.engine.dropout import KeyedDropout
from fwdlearn.engine.params import in_place
from fwdlearn.engine.queries import Queries
from fwdlearn.engine.sequential import mixes_rows
from fwdlearn.engine.trace import TraceError
from fwdlearn.errors import FwdlearnError
from fwdlearn.keys import Key

# What the copies of a pass may take.
_BYTES = {"cpu": 16 * 2**20, "cuda": 2 * 2**30}
# One copy is what the sequential rung does without `vmap`.
_LEAST = 2
_LOOP = " hit the vmap fallback"


def run(
    model: nn.Module,
    params: Mapping[str, Tensor],
    queries: Queries,
    row_losses: Callable[[object, Batch], Tensor],
    block: int,
    memory_budget: int | None = None,
    loops: bool = True,
) -> Tensor:
    """Losses [queries].

    Args:
        row_losses: (output, rows) -> losses; runs under `vmap` too.
        block: rows of all copies of a pass at most.
        memory_budget: bytes that the copies of a pass may take, if less than the default.
        loops: whether operations that `vmap` can only run one copy at a time are allowed.

    Raises:
        TraceError: the model cannot run on a stack of copies, or two do not fit into memory.
    """
    if mixes_rows(model):
        raise TraceError("batch normalisation in training mode would write on its statistics")
    budget = _BYTES.get(queries.row.device.type, 2**28)
    budget = min(budget, memory_budget or budget)
    size = sum(value.numel() * value.element_size() for value in params.values())
    if budget < _LEAST * size:
        raise TraceError(
            f"two copies of the parameters ({2 * size / 2**20:.1f} MiB) take more than "
            f"{budget / 2**20:.1f} MiB"
        )
    out: Tensor | None = None
    with _suited(queries.row.device, loops):
        for members in _stacks(queries, block, budget // size):
            try:
                losses = _pass(model, params, queries, row_losses, members)
            except (FwdlearnError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # anyone's model, and what `vmap` makes of it
                raise TraceError(_first_sentence(error)) from error
            if out is None:
                out = losses.new_empty(len(queries))
            out[members] = losses
    assert out is not None
    return out


def looped(
    model: nn.Module,
    params: Mapping[str, Tensor],
    queries: Queries,
    row_losses: Callable[[object, Batch], Tensor],
) -> str | None:
    """The first operation that `vmap` can only run one copy at a time, or None."""
    try:
        run(model, params, queries, row_losses, len(queries), loops=False)
    except TraceError as error:
        name, found, _ = str(error).partition(_LOOP)
        return name if found else None
    return None


def _stacks(queries: Queries, block: int, fitting: int) -> Iterator[Tensor]:
    """int64 [copies, rows]: queries, each line of them on a copy of its own."""
    lines: defaultdict[int, list[Tensor]] = defaultdict(list)
    for _, _, mine in queries.points():
        # Divided as the sequential rung divides them.
        for part in mine.split(block):
            lines[len(part)].append(part)
    for rows, parts in lines.items():
        yield from torch.stack(parts).split(max(1, min(fitting, block // rows)))


def _pass(
    model: nn.Module,
    params: Mapping[str, Tensor],
    queries: Queries,
    row_losses: Callable[[object, Batch], Tensor],
    members: Tensor,
) -> Tensor:
    row = queries.row[members]
    inputs = queries.batch.select(row.flatten()).map(lambda value: value.unflatten(0, row.shape))
    # What a pass writes on its buffers must leave no trace.
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def one(
        copy: dict[str, Tensor],
        number: Tensor,
        args: Sequence[Tensor],
        kwargs: dict[str, Tensor],
        targets: Tensor,
    ) -> Tensor:
        with _masks(queries.dropout, row, number):
            state = in_place(model, {**copy, **buffers})
            output = functional_call(model, state, tuple(args), kwargs, tie_weights=False)
        return row_losses(output, Batch(tuple(args), targets, kwargs))

    copies = _copies(params, queries.at(members[:, 0]))
    numbers = torch.arange(len(row), device=row.device)
    return vmap(one)(copies, numbers, inputs.args, dict(inputs.kwargs), inputs.targets)


def _copies(params: Mapping[str, Tensor], points: Queries) -> dict[str, Tensor]:
    """Name -> [copies, *shape]: added in float32 (float64 for float64) and rounded once."""
    copies = {}
    for name, value in params.items():
        if name not in points.directions.sites:
            copies[name] = value.expand(len(points), *value.shape)
            continue
        wide = torch.promote_types(value.dtype, torch.float32)
        scale = points.scale.to(wide).reshape(-1, *[1] * value.dim())
        step = points.directions.dense(name, points.direction).to(wide) * scale
        copies[name] = step.add_(value.to(wide)).to(value.dtype)
    return copies


class _StackedDropout(KeyedDropout):
    """The masks of one copy, drawn for all copies at once: `vmap` has no rule for drawing.

    Args:
        rows: int64 [copies, rows].
        number: int64 scalar under `vmap`: which copy.
    """

    def __init__(self, key: Key, rows: Tensor, number: Tensor) -> None:
        super().__init__(key, rows[0])
        self.rows, self.number = rows, number

    def _words(self, block: Tensor, stream: tuple[Tensor, Tensor]) -> Tensor:
        words = self.key.words(block, self.rows.reshape(-1, 1), stream)
        return words.unflatten(0, self.rows.shape)[self.number]


def _masks(key: Key | None, rows: Tensor, number: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if key is None else _StackedDropout(key, rows, number)


@contextmanager
def _suited(device: torch.device, loops: bool) -> Iterator[None]:
    """Without fused kernels that have no rule under `vmap`, and without its warnings."""
    functorch: Any = torch._C._functorch
    mha = torch.backends.mha
    fast, allowed = mha.get_fastpath_enabled(), functorch._is_vmap_fallback_enabled()
    mha.set_fastpath_enabled(False)
    functorch._set_vmap_fallback_enabled(loops)
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        with nullcontext() if device.type == "cuda" else sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(fast)
        functorch._set_vmap_fallback_enabled(allowed)
        functorch._set_vmap_fallback_warning_enabled(True)


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].removeprefix("vmap: ")[:150]
