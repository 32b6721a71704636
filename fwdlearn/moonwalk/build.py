"""Chains ready to train: a deep perceptron and a reversible convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

from fwdlearn.errors import UsageError
from fwdlearn.models.built import weights_from
from fwdlearn.moonwalk.activation import LeakyReLU
from fwdlearn.moonwalk.chain import Chain
from fwdlearn.moonwalk.convolution import Conv2d, Patches2d
from fwdlearn.moonwalk.coupling import Coupling
from fwdlearn.moonwalk.layer import Layer
from fwdlearn.moonwalk.linear import Dense, Orthogonal, Reshape


def mlp(
    inputs: int,
    width: int,
    depth: int,
    outputs: int,
    slope: float = 0.2,
    orthogonal: bool = False,
    seed: int = 0,
) -> Chain:
    """`depth` hidden layers with leaky ReLUs, and a linear head. Submersive if width <= inputs.

    Args:
        inputs: features of a row.
        width: of the hidden layers; a wider one than `inputs` leaves a fragment once.
        depth: hidden layers, at least 1.
        outputs: width of the output.
        slope: of the leaky ReLUs, in (0, 1].
        orthogonal: keeps the square weights orthogonal while they are trained.
        seed: of the first weights, orthogonal and scaled to keep the size of activations.
    """
    if depth < 1:
        raise UsageError(f"mlp(depth=...) must be at least 1, got {depth!r}.")
    gain = (2 / (1 + slope**2)) ** 0.5
    with weights_from(seed):
        layers: list[Layer] = []
        for before in (inputs, *[width] * (depth - 1)):
            square = orthogonal and before == width
            layers += [Orthogonal(width) if square else Dense(before, width, gain=gain)]
            layers += [LeakyReLU(slope)]
        return Chain([*layers, Dense(width, outputs)])


def cnn(
    shape: Sequence[int],
    channels: Sequence[int],
    blocks: int,
    outputs: int,
    slope: float = 0.2,
    seed: int = 0,
) -> Chain:
    """Stages of 2 x 2 patches and additive couplings with convolutions; then a linear head.

    Args:
        shape: (channels, height, width) of a row; each side divisible by 2^len(channels).
        channels: of each stage, even. A stage is submersive if it has at most four times the
            channels of the one before.
        blocks: couplings of a stage, each with two branches of two 3 x 3 convolutions.
        outputs: width of the output.
        slope: of the leaky ReLUs in the branches, in (0, 1].
        seed: of the first weights.
    """
    before, height, width = shape
    if any(size % 2 for size in channels):
        raise UsageError(f"cnn(channels=...) must be even, got {list(channels)}.")

    def branch(half: int) -> Chain:
        # Small, so that a deep chain starts near the identity.
        last = Conv2d(half, half, gain=0.3)
        return Chain([Conv2d(half, half, gain=1.4), LeakyReLU(slope), last])

    with weights_from(seed):
        layers: list[Layer] = []
        for size in channels:
            layers.append(Patches2d(before, size, 2))
            layers += [Coupling(branch(size // 2), branch(size // 2)) for _ in range(blocks)]
            before, height, width = size, height // 2, width // 2
        flat = before * height * width
        layers += [Reshape((before, height, width), (flat,)), Dense(flat, outputs)]
        return Chain(layers)
