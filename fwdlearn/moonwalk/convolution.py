"""Convolutions: over disjoint patches, causal, and the ordinary one that cannot be undone."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight

from fwdlearn.errors import UsageError
from fwdlearn.moonwalk.layer import Gradients, Layer
from fwdlearn.moonwalk.linear import affine
from fwdlearn.moonwalk.pooling import windows
from fwdlearn.moonwalk.rank import Fragment, erased, keep, right_inverse, undo


class Patches2d(Layer):
    """A convolution whose stride is its kernel size: one dense layer on each patch.

    Leaves nothing where outputs <= inputs * size^2, else the difference for each patch. Size 1 is
    the 1 x 1 convolution.

    Args:
        inputs: channels of x [rows, inputs, height, width].
        outputs: channels of y [rows, outputs, height / size, width / size].
        size: of a patch, in pixels; it must divide height and width.
        bias: whether a bias is added.
        gain: singular values of the first weights, which are orthogonal.
        cutoff: in [0, 1); singular values below `cutoff` times the largest count as zero.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        bias: bool = True,
        gain: float = 1.0,
        cutoff: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= cutoff < 1:
            raise UsageError(f"Patches2d(cutoff=...) must lie in [0, 1), got {cutoff!r}.")
        self.weight = nn.Parameter(torch.empty(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.size, self.cutoff = size, cutoff
        nn.init.orthogonal_(self.weight, gain)

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        return len(self.weight) == self.weight[0].numel()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.size)

    def vjp(self, residual: None, h: Tensor) -> Tensor:
        return F.conv_transpose2d(h, self.weight.to(h.dtype), stride=self.size)

    def fragment(self, residual: None, h: Tensor) -> Fragment | None:
        return keep(h.movedim(1, -1), erased(self._matrix(h), self.cutoff))

    def vijp(self, residual: None, h: Tensor, fragment: Fragment | None) -> Tensor:
        return undo(self._patches(h), self._matrix(h), fragment).movedim(-1, 1)

    def gradients(self, x: Tensor, h: Tensor) -> Gradients:
        cotangent = h.to(x.dtype).movedim(1, -1)
        found = affine(self._patches(x), cotangent, self.bias is not None)
        return {**found, "weight": found["weight"].view_as(self.weight)}

    def inverse(self, y: Tensor) -> Tensor:
        if not self.invertible:
            return super().inverse(y)
        if self.bias is not None:
            y = y - self.bias[:, None, None]
        flat = torch.linalg.solve(self._matrix(y).T, y.movedim(1, -1), left=False).movedim(-1, 1)
        tiles = flat.unflatten(1, self.weight.shape[1:]).permute(0, 1, 4, 2, 5, 3)
        return tiles.flatten(4).flatten(2, 3)

    def _matrix(self, h: Tensor) -> Tensor:
        return self.weight.to(h.dtype).flatten(1)

    def _patches(self, x: Tensor) -> Tensor:
        """[rows, inputs, height, width] -> [rows, height / size, width / size, patch]."""
        return windows(x, self.size).movedim(1, -2).flatten(-2)


class CausalConv1d(Layer):
    """A convolution over time, y[t] = sum_k W_k x[stride t + stride - 1 - k]: no look ahead.

    The last step depends on the newest inputs through the newest taps alone, so cotangents are
    found from the last step to the first, a block of steps at a time. Leaves nothing where
    outputs <= inputs * stride, else the difference for each step. Stable where the newest taps
    outweigh the rest, as the first weights do.

    Args:
        inputs: channels of x [rows, inputs, time].
        outputs: channels of y [rows, outputs, time / stride].
        kernel: taps, at least `stride`.
        stride: steps of x for one of y; it must divide the time.
        bias: whether a bias is added.
        block: least number of steps that are solved for at once, as one matrix.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        bias: bool = True,
        block: int = 8,
    ) -> None:
        super().__init__()
        if not 1 <= stride <= kernel:
            raise UsageError(
                "CausalConv1d(kernel=..., stride=...) needs 1 <= stride <= kernel, got "
                f"{kernel} and {stride}."
            )
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.stride, self.block = stride, max(block, math.ceil(kernel / stride) - 1)
        newest = torch.empty(outputs, inputs * stride)
        nn.init.orthogonal_(newest)
        nn.init.normal_(self.weight, std=0.2 / (kernel * math.sqrt(inputs)))
        with torch.no_grad():
            self.weight[..., kernel - stride :] = newest.view(outputs, inputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(self._padded(x), self.weight, self.bias, self.stride)

    def vjp(self, residual: None, h: Tensor) -> Tensor:
        full = F.conv_transpose1d(h, self.weight.to(h.dtype), stride=self.stride)
        return full[..., self.weight.shape[2] - self.stride :]

    def fragment(self, residual: None, h: Tensor) -> Fragment | None:
        return keep(h.movedim(1, -1), erased(self._taps(h)[0], 0.0))

    def vijp(self, residual: None, h: Tensor, fragment: Fragment | None) -> Tensor:
        taps, block = self._taps(h), self.block
        outputs = taps.shape[1]
        rows, _, time = h.shape
        steps, rest = time // self.stride, -(time // self.stride) % block
        # [rows, steps, inputs * stride]; steps after the end have no cotangent.
        known = h.unflatten(2, (steps, self.stride)).movedim(1, 2).flatten(2)
        known = F.pad(known, (0, 0, 0, rest))
        beyond = _toeplitz(taps, block, block)
        inverse, kept = self._inverse(taps, fragment, rest)
        solved: list[Tensor] = [h.new_zeros(rows, block * outputs)]
        for start in range(steps + rest - block, -1, -block):
            product = known[:, start : start + block].flatten(1) - solved[-1] @ beyond
            if kept is not None:
                product = torch.cat([product, kept[:, start : start + block].flatten(1)], 1)
            solved.append(product @ inverse)
        found = torch.cat(solved[:0:-1], 1).unflatten(1, (-1, outputs))
        return found[:, :steps].movedim(1, 2)

    def gradients(self, x: Tensor, h: Tensor) -> Gradients:
        h = h.to(x.dtype)
        shape = tuple(self.weight.shape)
        found = {"weight": conv1d_weight(self._padded(x), shape, h, self.stride)}
        return found if self.bias is None else {**found, "bias": h.sum((0, 2))}

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (self.weight.shape[2] - self.stride, 0))

    def _taps(self, h: Tensor) -> Tensor:
        """[lags, outputs, inputs * stride]: y of a step from the inputs of the step `lag` ago."""
        weight = self.weight.to(h.dtype)
        weight = F.pad(weight, (-weight.shape[2] % self.stride, 0))
        return weight.unflatten(2, (-1, self.stride)).permute(2, 0, 1, 3).flatten(2).flip(0)

    def _inverse(
        self, taps: Tensor, fragment: Fragment | None, rest: int
    ) -> tuple[Tensor, Tensor | None]:
        """The right inverse of a block of steps, and the erased parts padded by `rest` steps."""
        within = _toeplitz(taps, self.block, 0)
        if fragment is None:
            return right_inverse(within, None), None
        one = torch.eye(self.block, dtype=taps.dtype, device=taps.device)
        basis = torch.kron(one, fragment.basis)
        return right_inverse(within, basis), F.pad(fragment.values, (0, 0, 0, rest))


class Conv2d(Layer):
    """An ordinary convolution with zero padding, for the branches of a coupling.

    As a layer of its own its fragment is the whole cotangent: one activation kept.

    Args:
        inputs: channels of x [rows, inputs, height, width].
        outputs: channels of y, of the same height and width.
        kernel: in pixels, odd.
        bias: whether a bias is added.
        gain: on the first weights, whose variance is gain^2 / fan-in.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, bias: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise UsageError(f"Conv2d(kernel=...) must be odd, got {kernel!r}.")
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.weight, std=gain / math.sqrt(inputs * kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)

    def vjp(self, residual: Any, h: Tensor) -> Tensor:
        weight = self.weight.to(h.dtype)
        return F.conv_transpose2d(h, weight, padding=weight.shape[-1] // 2)

    def gradients(self, x: Tensor, h: Tensor) -> Gradients:
        h, shape = h.to(x.dtype), tuple(self.weight.shape)
        weight = conv2d_weight(x, shape, h, padding=shape[-1] // 2)
        found = {"weight": weight}
        return found if self.bias is None else {**found, "bias": h.sum((0, 2, 3))}


def _toeplitz(taps: Tensor, block: int, offset: int) -> Tensor:
    """Block matrix [block * outputs, block * width] of taps at lags offset + row - column."""
    lags, outputs, width = taps.shape
    steps = torch.arange(block, device=taps.device)
    lag = offset + steps[:, None] - steps
    chosen = taps[lag.clamp(0, lags - 1)] * ((lag >= 0) & (lag < lags))[..., None, None]
    return chosen.movedim(2, 1).reshape(block * outputs, block * width)
