"""A small convolutional network: convolutions that shrink the image, then linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fwdlearn.data.types import DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.models.activation import activation_named
from fwdlearn.models.built import Built, weights_from


class CNN(nn.Module):
    """Maps images [rows, channels, height, width] to [rows, outputs]."""

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: Sequence[int],
        kernel_size: int,
        stride: int,
        activation: nn.Module,
        hidden: Sequence[int],
        outputs: int,
    ) -> None:
        super().__init__()
        pairs = zip([shape[0], *channels[:-1]], channels, strict=True)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(m, n, kernel_size, stride, kernel_size // 2) for m, n in pairs
        )
        self.pools, self.averages, self.activation = stride == 1, not hidden, activation
        with torch.no_grad():
            width = self._features(torch.zeros(1, *shape)).shape[1]
        widths = [width, *hidden]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.hidden = nn.ModuleList(nn.Linear(m, n) for m, n in pairs)
        self.head = nn.Linear(widths[-1], outputs)

    def _features(self, x: Tensor) -> Tensor:
        for i, convolution in enumerate(self.convolutions):
            if self.pools and i > 0 and min(x.shape[2:]) > 1:
                x = F.max_pool2d(x, 2)
            x = self.activation(convolution(x))
        return x.mean((2, 3)) if self.averages else x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self._features(x)
        for layer in self.hidden:
            x = self.activation(layer(x))
        return self.head(x)


def cnn(
    info: DataInfo,
    channels: Sequence[int] = (16, 32),
    kernel_size: int = 3,
    activation: str = "relu",
    stride: int = 1,
    hidden: Sequence[int] = (),
    seed: int = 0,
) -> Built:
    """Builds a small convolutional network for images.

    There are no batch statistics, so a row's output depends on that row alone.

    Args:
        info: of the data; kind `image`.
        channels: of each convolution, at least one number.
        kernel_size: of every convolution in pixels, odd.
        activation: `relu`, `gelu`, `silu`, `tanh` or `threshold` (1 above 0, else 0).
        stride: of every convolution, at least 1; at 1 each side is halved between convolutions by
            taking maxima.
        hidden: width of each linear layer between the last feature maps and the head, at least 1;
            empty to average the maps over the image instead.
        seed: of the weights, drawn as torch draws them for its layers.

    Raises:
        UsageError: the data are not images, or an argument is out of range.
    """
    if info.kind != "image":
        raise UsageError(f"cnn reads images, not {info.kind}; mlp reads features.")
    if not channels or min(channels) < 1:
        raise UsageError(
            f"cnn(channels=...) must hold one or more numbers of at least 1, got {list(channels)}."
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise UsageError(f"cnn(kernel_size=...) must be odd and positive, got {kernel_size!r}.")
    if stride < 1:
        raise UsageError(f"cnn(stride=...) must be at least 1, got {stride!r}.")
    if any(width < 1 for width in hidden):
        raise UsageError(f"cnn(hidden=...) must hold widths of at least 1, got {list(hidden)!r}.")
    with weights_from(seed):
        function = activation_named(activation, "cnn")
        module = CNN(info.shape, channels, kernel_size, stride, function, hidden, info.outputs)
        return Built(module.eval())
