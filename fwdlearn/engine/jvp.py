"""Exact slopes by torch's own forward mode, for models that the structured dual cannot follow.

`vmap` over the directions of `jvp`: the plain values are shared, and each direction is a dense
tangent of every parameter. A product costs two more for each direction, and K directions take the
memory of K sets of parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine.layout import SlopePass
from fwdlearn.engine.offload import is_offloaded
from fwdlearn.engine.params import in_place
from fwdlearn.engine.queries import masks
from fwdlearn.errors import FwdlearnError
from fwdlearn.keys import Key

# (all directions at once or one after the other, with or without libraries for whole layers)
Ways = list[tuple[bool, bool]]
_WAYS = ((True, True), (True, False), (False, True), (False, False))


class JvpError(Exception):
    """The model has no forward derivative; the message is the reason that the user sees."""


class Jvp:
    """Forward mode through a whole model, with dense tangents.

    Args:
        model: any module whose operations have forward derivatives.
        params: name -> trainable tensor.
        row_losses: (output, rows) -> losses.
        budget: bytes that tangents may take; one direction runs whatever it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        row_losses: Callable[[object, Batch], Tensor],
        budget: int = 2**28,
    ) -> None:
        self.model, self.row_losses = model, row_losses
        self.params = dict(params)
        size = sum(value.numel() * value.element_size() for value in params.values())
        self.together = max(1, budget // size)
        offloaded = any(is_offloaded(value) for value in params.values())
        self._too_large = size if offloaded and size > budget else 0
        self._ways: Ways = list(_WAYS)

    def run(
        self, batch: Batch, some: SlopePass, directions: Directions, dropout: Key | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses [rows] and slopes [K, rows] of a pass whose rows share their directions.

        Args:
            dropout: names the masks, or None.

        Raises:
            JvpError: an operation has no forward derivative, or there are tangents of offloaded
                weights that do not fit into the budget.
        """
        if self._too_large:
            raise JvpError(
                f"it would hold {self._too_large / 2**20:.0f} MiB of weights that are offloaded, "
                "and tangents as large, on the device"
            )
        rows = batch.select(some.row)
        # With gradients required, torch would build a graph beside.
        held = {name: value.detach() for name, value in self.params.items()}

        def losses(*values: Tensor) -> Tensor:
            # What a pass writes into its statistics must not outlive it.
            state = {name: value.clone() for name, value in self.model.named_buffers()}
            state |= dict(zip(self.params, values, strict=True))
            with masks(dropout, some.row):
                output = functional_call(
                    self.model,
                    in_place(self.model, state),
                    rows.args,
                    dict(rows.kwargs),
                    tie_weights=False,
                )
            return self.row_losses(output, rows)

        def push(*tangents: Tensor) -> Any:
            # A derivative needs memory of its own for every entry; virtual weights have none.
            primals = tuple(value.contiguous() for value in held.values())
            return jvp(losses, primals, tangents)

        plain, slopes = None, []
        for ids in some.direction.split(self.together):
            tangents = [directions.dense(name, ids) for name in self.params]
            ways = list(self._ways)
            try:
                plain, part = along(push, tangents, ways)
            except (FwdlearnError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, NotImplementedError, ValueError) as error:
                # What fails without derivatives too is not for this rung to explain.
                losses(*held.values())
                raise JvpError(reason(error)) from error
            self._ways = ways
            slopes.append(part)
        assert plain is not None
        return plain, torch.cat(slopes)


def along(push: Callable[..., Any], tangents: Sequence[Tensor], ways: Ways | None = None) -> Any:
    """`push` along each of K directions.

    Args:
        push: one tangent for each tensor -> (what does not depend on them, what does).
        tangents: [K, ...] each.
        ways: those that are left to try; one that fails is taken out, unless it is the last.

    Returns:
        What `push` returns, the second part with K in front.
    """
    ways = list(_WAYS) if ways is None else ways
    while True:
        together, libraries = ways[0]
        try:
            with _kernels(libraries):
                if together:
                    out_dims: Any = (None, 0)
                    return vmap(push, out_dims=out_dims, randomness="same")(*tangents)
                parts = [push(*one) for one in zip(*tangents, strict=True)]
                return parts[0][0], _stacked([part[1] for part in parts])
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if isinstance(error, (FwdlearnError, torch.OutOfMemoryError)) or len(ways) == 1:
                raise
            ways.pop(0)


def reason(error: Exception) -> str:
    """The first line of what torch says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _stacked(parts: list[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(torch.stack(column) for column in zip(*parts, strict=True))
    return torch.stack(parts)


@contextmanager
def _kernels(libraries: bool) -> Iterator[None]:
    """Without fused attention, and without libraries that run whole recurrent layers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # `vmap` warns where it runs a loop, and a switch of oneDNN of devices that are not there.
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            if libraries:
                yield
            else:
                with (
                    torch.backends.mkldnn.flags(enabled=False),
                    torch.backends.cudnn.flags(enabled=False),
                ):
                    yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
