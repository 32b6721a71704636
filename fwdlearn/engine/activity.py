"""Exact slopes along noise at the outputs of layers, by torch's forward mode.

Noise of scale s enters as in any noisy pass, with s = 0 and ds = 1: what comes out beside a loss is
its derivative along the noise. One tangent a query, whatever the model's width or depth, and no
graph. An operation that hides its derivative is found out by differences at the first call.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fwdlearn.batch import Batch
from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import Noise

if TYPE_CHECKING:
    from fwdlearn.engine.ladder import Engine

# Numbers of noise that are made at once.
_NUMBERS = 2**22
# Largest difference from differences of losses, relative to the slopes; and the sizes tried.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-2}
_SIZES = (1e-2, 1e-3, 1e-4)


class ActivitySlopes:
    """Slopes along noise in one model.

    Args:
        engine: knows the model and where noise enters.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self._checked = engine, False

    def __call__(
        self, batch: Batch, row: Tensor, noise: Noise, index: Tensor, dropout: Key | None
    ) -> tuple[Tensor, Tensor]:
        """Losses [queries] without noise, and their derivatives [queries] along it.

        Raises:
            UsageError: an operation of the model has no forward derivative, or hides it.
        """
        if not self._checked:
            self._check(batch, row[:2], noise, index[:2], dropout)
            self._checked = True
        return self._slopes(batch, row, noise, index, dropout)

    def _slopes(
        self, batch: Batch, row: Tensor, noise: Noise, index: Tensor, dropout: Key | None
    ) -> tuple[Tensor, Tensor]:
        # Forward mode does not work on tensors of inference mode, nor in fused attention.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            forward_ad.dual_level(),
        ):
            still = torch.zeros(len(row), dtype=torch.float64, device=row.device)
            scale = forward_ad.make_dual(still, torch.ones_like(still))
            try:
                losses = self.engine.activations.noisy_losses(
                    batch, row, _Entering(noise), index, scale, dropout
                )
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, (FwdlearnError, torch.OutOfMemoryError)):
                    raise
                first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
                raise UsageError(f"{self._refused}: {first}. {_WAY_OUT}") from error
            plain, slopes = forward_ad.unpack_dual(losses)
            if slopes is None:
                raise UsageError(f"{self._refused}: no tangent reaches the loss. {_WAY_OUT}")
            return plain.clone(), slopes.clone()

    def _check(
        self, batch: Batch, row: Tensor, noise: Noise, index: Tensor, dropout: Key | None
    ) -> None:
        found = self._slopes(batch, row, noise, index, dropout)[1].double()
        if not found.any():
            raise UsageError(f"{self._refused}: its loss has no slope. {_WAY_OUT}")
        dtypes = {value.dtype for value in self.engine.params.values()}
        tolerance, least = max(_TOLERANCE.get(dtype, 0.5) for dtype in dtypes), math.inf
        for size in _SIZES:
            up, down = (
                self.engine.activations.noisy_losses(
                    batch, row, noise, index, torch.full_like(found, side * size), dropout
                ).double()
                for side in (1, -1)
            )
            differences = (up - down) / (2 * size)
            apart = (found - differences).norm() / differences.norm().clamp(min=1e-300)
            least = min(least, float(apart)) if apart.isfinite() else least
            if least <= tolerance:
                return
        if math.isfinite(least):
            raise UsageError(
                f"{self._refused}: its slopes differ from differences of losses by {least:.0e} "
                f"(allowed: {tolerance:.0e}), so an operation hides its derivative. {_WAY_OUT}"
            )

    @property
    def _refused(self) -> str:
        return f"{type(self.engine.model).__name__} gives no exact slopes along activation noise"


_WAY_OUT = "Choose an estimator that needs losses alone (`fwdlearn ls` shows what each one needs)."


class _Entering(Noise):
    """The same noise, added so that the derivative by its scale is kept."""

    def __init__(self, noise: Noise) -> None:
        self.noise, self.count, self.scales = noise, noise.count, noise.scales

    @property
    def names(self) -> tuple[str, ...]:
        return self.noise.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.noise.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.noise.dtype(name)

    def times(self, name: str, ids: Tensor, factor: Tensor, score: bool = False) -> Tensor:
        return self.noise.times(name, ids, factor, score)

    def add(self, out: Tensor, name: str, ids: Tensor, scale: Tensor) -> None:
        """See `Noise.add`. Numbers are drawn through their bits, so they take no dual scale."""
        step = max(1, _NUMBERS // max(1, math.prod(self.shape(name))))
        size = torch.tensor(self.size(name), dtype=self.dtype(name), device=ids.device)
        for start in range(0, len(ids), step):
            some = slice(start, start + step)
            numbers = self.noise.times(name, ids[some], size.expand(len(ids[some])))
            factor = scale[some].to(numbers.dtype).view(-1, *[1] * (numbers.dim() - 1))
            out[some].add_((factor * numbers).to(out.dtype))
