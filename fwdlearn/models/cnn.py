"""A small convolutional network: convolutions with pooling between them, one linear head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fwdlearn.data.types import DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.models.activation import activation_named
from fwdlearn.models.built import Built, weights_from


class CNN(nn.Module):
    """Maps images [rows, channels, height, width] to [rows, outputs]."""

    def __init__(
        self, channels: Sequence[int], kernel_size: int, activation: nn.Module, outputs: int
    ) -> None:
        super().__init__()
        pairs = zip(channels[:-1], channels[1:], strict=True)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(m, n, kernel_size, padding=kernel_size // 2) for m, n in pairs
        )
        self.activation = activation
        self.head = nn.Linear(channels[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        for i, convolution in enumerate(self.convolutions):
            if i > 0 and min(x.shape[2:]) > 1:
                x = F.max_pool2d(x, 2)
            x = self.activation(convolution(x))
        return self.head(x.mean((2, 3)))


def cnn(
    info: DataInfo,
    channels: Sequence[int] = (16, 32),
    kernel_size: int = 3,
    activation: str = "relu",
    seed: int = 0,
) -> Built:
    """Builds a small convolutional network for images.

    Between two convolutions each side is halved; the last feature maps are averaged. There are no
    batch statistics, so a row's output depends on that row alone.

    Args:
        info: of the data; kind `image`.
        channels: of each convolution, at least one number.
        kernel_size: of every convolution in pixels, odd.
        activation: `relu`, `gelu`, `silu` or `tanh`.
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
    with weights_from(seed):
        function = activation_named(activation, "cnn")
        sizes = [info.shape[0], *channels]
        return Built(CNN(sizes, kernel_size, function, info.outputs).eval())
