"""The reference pass: one perturbed copy of the parameters at a time.

Slow, and right for any model that runs at all. Every faster rung is measured against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine.params import in_place
from fwdlearn.engine.queries import Queries
from fwdlearn.errors import UsageError


def run(
    model: nn.Module,
    params: Mapping[str, Tensor],
    queries: Queries,
    row_losses: Callable[[object, Batch], Tensor],
    block: int,
) -> Tensor:
    """Losses [queries], each group of one direction and scale on its own copy.

    Args:
        row_losses: (output, rows) -> losses.
        block: rows of one forward pass at most.

    Raises:
        UsageError: rows influence each other (batch statistics) and a direction is not asked for
            exactly the rows of the batch, all at once; or the model is compiled by torch.jit.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            f"{type(model).__name__} is compiled by torch.jit; put it inside an nn.Module, which "
            "can be given other parameters."
        )
    mixing = mixes_rows(model)
    out: Tensor | None = None
    for direction, scale, mine in queries.points():
        copy = perturbed_copy(params, queries.directions, direction, scale)
        if mixing:
            check_whole(queries.row[mine], len(queries.batch))
            # Perturbed passes must leave no trace in the running statistics.
            copy |= {name: value.clone() for name, value in model.named_buffers()}
        for part in mine.split(len(queries.batch) if mixing else block):
            some = queries.at(part)
            rows = some.inputs()
            with some.masks():
                state = in_place(model, copy)
                output = functional_call(
                    model, state, rows.args, dict(rows.kwargs), tie_weights=False
                )
            losses = row_losses(output, rows)
            if out is None:
                out = losses.new_empty(len(queries))
            out[part] = losses
        # Not alive beside the next one.
        del copy
    assert out is not None
    return out


def perturbed_copy(
    params: Mapping[str, Tensor], directions: Directions, direction: int, scale: float
) -> dict[str, Tensor]:
    """`params + scale * E`, added in float32 (float64 for float64) and rounded once.

    A parameter that the family lacks is passed on as it is.
    """
    copy = {}
    for name, value in params.items():
        if name not in directions.sites:
            copy[name] = value
            continue
        ids = torch.tensor([direction], device=value.device)
        wide = torch.promote_types(value.dtype, torch.float32)
        step = directions.dense(name, ids)[0].to(wide)
        copy[name] = torch.add(value.to(wide), step, alpha=scale).to(value.dtype)
    return copy


def mixes_rows(model: nn.Module) -> bool:
    """Whether batch statistics make the loss of a row depend on the other rows."""
    kind = nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, kind) and module.training for module in model.modules())


def check_whole(row: Tensor, rows: int) -> None:
    if not torch.equal(row.sort().values, torch.arange(rows, device=row.device)):
        raise UsageError(
            "batch normalisation in training mode makes each loss depend on the whole batch, so "
            "all rows must share their directions: set the allocator's sharing to 'shared', or "
            "leave train_mode off."
        )
