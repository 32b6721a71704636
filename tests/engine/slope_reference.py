"""Slopes found slowly: `torch.func.jvp` along written out tangents, and central differences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine.queries import masks
from fwdlearn.keys import Key


class Wide(TorchFunctionMode):
    """Keeps float64 where a model casts to float32: differences of losses would see it round."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrow = func is Tensor.float or (func is Tensor.to and torch.float32 in args)
        if narrow and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def by_jvp(engine: Engine, batch: Batch, family: Directions, dropout: Key | None = None) -> Tensor:
    """[directions, rows]: forward mode along each dense direction, through unfused operations."""
    params = {name: value.detach() for name, value in engine.params.items()}
    row = torch.arange(len(batch))

    def losses(*values: Tensor) -> Tensor:
        state = {name: value.clone() for name, value in engine.model.named_buffers()}
        state |= dict(zip(params, values, strict=True))
        with masks(dropout, row):
            output = functional_call(engine.model, state, batch.args, dict(batch.kwargs))
        return engine.row_losses(output, batch)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            slopes = []
            for number in range(family.count):
                ids = torch.tensor([number])
                tangents = tuple(family.dense(name, ids)[0] for name in params)
                slopes.append(jvp(losses, tuple(params.values()), tangents)[1])
            return torch.stack(slopes)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def by_differences(
    engine: Engine,
    batch: Batch,
    family: Directions,
    dropout: Key | None = None,
    size: float = 2e-6,
) -> Tensor:
    """[directions, rows]: central differences of fourth order on the slow reference pass."""
    slow = Engine(engine.model, engine.objective, rung="sequential")
    rows, count = len(batch), family.count
    row = torch.arange(rows).repeat(count)
    direction = torch.arange(count).repeat_interleave(rows)

    def difference(size: float) -> Tensor:
        with torch.inference_mode():
            up, down = (
                slow.losses(batch, row, family, direction, scale, dropout)
                for scale in (size, -size)
            )
        return (up - down) / (2 * size)

    return ((4 * difference(size) - difference(2 * size)) / 3).view(count, rows).clone()


def queries(rows: int, count: int, private: bool) -> tuple[Tensor, Tensor]:
    """Row and direction of queries: every direction for every row, or a few for each, unevenly."""
    row, direction = torch.arange(rows).repeat(count), torch.arange(count).repeat_interleave(rows)
    if not private:
        return row, direction
    kept = (row + 2 * direction) % 3 != 0
    mixed = torch.randperm(int(kept.sum()), generator=torch.Generator().manual_seed(0))
    return row[kept][mixed], direction[kept][mixed]


def check(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Relative to the largest slope, so that none near zero decides."""
    assert expected.abs().max() > 1e-6, f"{what}: no slope to compare with"
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance, f"{what}: {difference:.1e} > {tolerance:.0e}"
