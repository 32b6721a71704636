"""Every kind of layer against autograd, one product at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.moonwalk import (
    CausalConv1d,
    Conv2d,
    Dense,
    Layer,
    LeakyReLU,
    Patches2d,
    Permutation,
    Reshape,
)
from fwdlearn.oracle import forbid_backward

from .layers import ERASING, EVERY, SUBMERSIVE, made

every = pytest.mark.parametrize("name", list(EVERY))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def automatic(layer: Layer, x: Tensor, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What autograd says of the cotangent of x and of the parameters."""
    x = x.clone().requires_grad_()
    named = dict(layer.named_parameters())
    first, *rest = torch.autograd.grad(layer(x), [x, *named.values()], h)
    return first, dict(zip(named, rest, strict=True))


@every
def test_products_equal_autograd(name: str) -> None:
    layer, x, h = made(name)
    expected, parameters = automatic(layer, x, h)
    with forbid_backward():
        y, residual = layer.observe(x)
        close(layer.vjp(residual, h), expected)
        gradients = layer.gradients(x, h)
        assert set(gradients) == set(parameters)
        for key, value in gradients.items():
            close(value, parameters[key])
        again, back, found = layer.pull(x, h)
        close(again, y)
        close(back, expected)
        assert set(found) == set(parameters)
    close(y, layer(x).detach())


@every
def test_vijp_undoes_vjp(name: str) -> None:
    layer, x, h = made(name)
    with forbid_backward():
        residual = layer.residual(x)
        fragment, before = layer.fragment(residual, h), layer.vjp(residual, h)
        close(layer.vijp(residual, before, fragment), h)
        y, after, gradients = layer.advance(x, before, fragment)
    close(y, layer(x).detach())
    close(after, h)
    for key, value in automatic(layer, x, h)[1].items():
        close(gradients[key], value)


@every
def test_cotangents_may_be_wider(name: str) -> None:
    """float64 cotangents over a float32 layer: the inverse keeps float64 precision."""
    layer, x, h = made(name)
    layer, x = layer.float(), x.float()
    residual = layer.residual(x)
    before = layer.vjp(residual, h)
    y, after, gradients = layer.advance(x, before, layer.fragment(residual, h))
    assert y.dtype == torch.float32 and after.dtype == torch.float64
    # tanh rounds its own derivative to float32, but the same way twice.
    torch.testing.assert_close(after, h, rtol=1e-9, atol=1e-9)
    assert all(value.dtype == torch.float32 for value in gradients.values())


@every
def test_tangents_are_transposed_products(name: str) -> None:
    layer, x, h = made(name)
    tangents = torch.randn(3, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    with forbid_backward():
        after = layer.jvp(x, tangents)
        before = layer.vjp(layer.residual(x), h)
    close((after * h).flatten(1).sum(1), (tangents * before).flatten(1).sum(1))


@every
def test_inverse(name: str) -> None:
    layer, x, _ = made(name)
    with torch.no_grad():
        y = layer(x)
        if layer.invertible:
            close(layer.inverse(y), x)
        else:
            with pytest.raises(UsageError, match=r"cannot be inverted; the first phase by res"):
                layer.inverse(y)


@pytest.mark.parametrize("name", list(SUBMERSIVE))
def test_submersive_layers_keep_nothing(name: str) -> None:
    layer, x, h = made(name)
    assert layer.fragment(layer.residual(x), h) is None


@pytest.mark.parametrize("name", list(ERASING))
def test_erasing_layers_keep_what_is_erased_and_no_more(name: str) -> None:
    layer, x, h = made(name)
    with torch.no_grad():
        fragment = layer.fragment(layer.residual(x), h)
    values = fragment if isinstance(fragment, Tensor) else fragment.values
    assert values.numel() == len(x) * ERASING[name][2]


def test_relu_keeps_the_cotangents_of_dead_units() -> None:
    layer, x, h = made("relu")
    fragment = layer.fragment(layer.residual(x), h)
    assert torch.equal(fragment, h[x <= 0]) and 0 < len(fragment) < h.numel()


def test_a_leaky_relu_leaves_one_bit_a_unit() -> None:
    x = torch.randn(64, 32)
    assert LeakyReLU().residual(x).data.untyped_storage().nbytes() == 64 * 32 / 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeakyReLU(0.0), r"LeakyReLU\(slope=...\) must lie in \(0, 1\], got 0.0"),
        (lambda: Dense(2, 2, cutoff=1.0), r"Dense\(cutoff=...\) must lie in \[0, 1\), got 1.0"),
        (lambda: Patches2d(2, 2, 1, cutoff=-1), r"Patches2d\(cutoff=...\) must lie in"),
        (lambda: CausalConv1d(2, 2, 1, stride=2), r"needs 1 <= stride <= kernel, got 1 and 2"),
        (lambda: Conv2d(2, 2, 4), r"Conv2d\(kernel=...\) must be odd, got 4"),
        (lambda: Permutation([0, 2]), r"must be a permutation, got \[0, 2\]"),
        (lambda: Reshape((2, 3), (4,)), r"cannot turn rows of \(2, 3\) into rows of \(4,\)"),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
