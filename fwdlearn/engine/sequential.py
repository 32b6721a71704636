"""The reference pass: one perturbed copy of the parameters at a time.

Slow, and right for any model that runs at all. Every faster rung is measured against it. Of a
large model only the small tensors are copied; the large ones are perturbed where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine.at_use import AtUse
from fwdlearn.engine.params import in_place
from fwdlearn.engine.queries import Queries
from fwdlearn.errors import UsageError
from fwdlearn.factors import LowRank

# Bytes of the smallest parameters that are copied for the time of a pass.
_COPIED_BYTES = 16 * 2**20
# Numbers of a parameter that are perturbed at once.
_AT_ONCE = 2**20


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
    large = _large(params)
    for direction, scale, mine in queries.points():

        def form(name: str, direction: int = direction, scale: float = scale) -> Tensor:
            value = params[name]
            # To torch what the parameter is. Of any other matrix `linear` makes a copy for each
            # row where its input is a slice.
            with torch.inference_mode(False), torch.no_grad():
                made = _perturbed(name, value, queries.directions, direction, scale)
            return made if made is value else made.requires_grad_(value.requires_grad)

        copy = {name: form(name) for name in params if name not in large}
        if mixing:
            check_whole(queries.row[mine], len(queries.batch))
            # Perturbed passes must leave no trace in the running statistics.
            copy |= {name: value.clone() for name, value in model.named_buffers()}
        for part in mine.split(len(queries.batch) if mixing else block):
            some = queries.at(part)
            rows = some.inputs()

            def losses(others: Mapping[str, Tensor], rows: Batch = rows) -> Tensor:
                state = in_place(model, others)
                output = functional_call(
                    model, state, rows.args, dict(rows.kwargs), tie_weights=False
                )
                return row_losses(output, rows)

            with some.masks(), AtUse(large, form) as seen:
                found = losses(copy)
            if seen.missed:
                # Used where torch functions do not show it, or not at all.
                copy |= {name: form(name) for name in seen.missed}
                large = {name: large[name] for name in large if name not in seen.missed}
                with some.masks(), AtUse(large, form):
                    found = losses(copy)
            if out is None:
                out = found.new_empty(len(queries))
            out[part] = found
        # Not alive beside the next one.
        del copy
    assert out is not None
    return out


def _large(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that are not copied for the time of a pass."""
    large, copied = {}, 0
    for name, value in sorted(params.items(), key=lambda item: item[1].numel()):
        copied += value.numel() * value.element_size()
        if copied > _COPIED_BYTES:
            large[name] = value
    return large


def perturbed_copy(
    params: Mapping[str, Tensor], directions: Directions, direction: int, scale: float
) -> dict[str, Tensor]:
    """`params + scale * E`, added in float32 (float64 for float64) and rounded once.

    A parameter that the family lacks is passed on as it is.
    """
    return {
        name: _perturbed(name, value, directions, direction, scale)
        for name, value in params.items()
    }


def _perturbed(
    name: str, value: Tensor, directions: Directions, direction: int, scale: float
) -> Tensor:
    if name not in directions.sites:
        return value
    wide = torch.promote_types(value.dtype, torch.float32)
    factors = directions.factors(name, torch.tensor([direction], device=value.device))
    if isinstance(factors, Tensor) or value.numel() <= _AT_ONCE:
        dense = factors if isinstance(factors, Tensor) else factors.dense()
        step = dense[0].reshape(value.shape).to(wide)
        return torch.add(value.to(wide), step, alpha=scale).to(value.dtype)
    # Some rows at a time, so that beside the result there is little of it in wider numbers.
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    matrix, target = value.reshape(factors.left.shape[1], -1), out.view(factors.left.shape[1], -1)
    rows = max(1, _AT_ONCE // matrix.shape[1])
    for left, old, new in zip(
        factors.left[0].split(rows), matrix.split(rows), target.split(rows), strict=True
    ):
        step = LowRank(left[None], factors.right, factors.scale).dense()[0].to(wide)
        new.copy_(torch.add(old.to(wide), step, alpha=scale))
    return out


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
