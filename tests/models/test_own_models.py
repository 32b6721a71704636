"""MLP, CNN and ViT: shapes, weights from the seed alone, rows that do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fwdlearn.data import DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.models import Built, cnn, mlp, vit

IMAGES = DataInfo("image", (1, 8, 8), 10)
FEATURES = DataInfo("features", (5,), None, values=2)
TEXT = DataInfo("text", (), 2)
FACTORIES: list[tuple[Callable[..., Built], dict[str, Any]]] = [
    (mlp, {}),
    (mlp, {"hidden": [], "bias": False}),
    (mlp, {"hidden": [16, 8], "activation": "tanh"}),
    (mlp, {"activation": "threshold"}),
    (cnn, {}),
    (cnn, {"channels": [4, 4, 4, 4, 4, 4], "kernel_size": 5}),
    (cnn, {"channels": [4, 6], "kernel_size": 5, "stride": 2, "hidden": [7, 5]}),
    (vit, {"depth": 2}),
    (vit, {"depth": 1, "pool": "class", "patch": 2, "hidden": 24}),
]


@pytest.mark.parametrize(("factory", "settings"), FACTORIES)
def test_every_model(factory: Callable[..., Built], settings: dict[str, Any]) -> None:
    built, again = factory(IMAGES, seed=3, **settings), factory(IMAGES, seed=3, **settings)
    other = factory(IMAGES, seed=4, **settings)
    weights, same = built.module.state_dict(), again.module.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert any(not torch.equal(value, weights[k]) for k, value in other.module.state_dict().items())
    assert not built.module.training and built.save is None and built.processor is None
    assert not any(isinstance(m, torch.nn.Dropout) for m in built.module.modules())
    x = torch.linspace(0, 1, 4 * 64).view(4, 1, 8, 8)
    with torch.no_grad():
        together = built.module(x)
        apart = torch.cat([built.module(row) for row in x.split(1)])
    assert together.shape == (4, 10) and together.dtype == torch.float32
    torch.testing.assert_close(together, apart)


def test_weights_do_not_depend_on_the_global_generator() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = mlp(IMAGES).module.state_dict()
        torch.manual_seed(2)
        second = mlp(IMAGES).module.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_regression_outputs() -> None:
    assert mlp(FEATURES).module(torch.zeros(3, 5)).shape == (3, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mlp(TEXT), "mlp reads features or images, not text; models.transformers reads"),
        (lambda: mlp(IMAGES, hidden=[4, 0]), r"mlp\(hidden=...\) must hold widths .* got \[4, 0\]"),
        (lambda: mlp(IMAGES, activation="rleu"), r"one of gelu, .*, threshold, got 'rleu'"),
        (lambda: cnn(FEATURES), "cnn reads images, not features; mlp reads features"),
        (lambda: cnn(IMAGES, channels=[]), r"cnn\(channels=...\) must hold one or more numbers"),
        (lambda: cnn(IMAGES, kernel_size=4), r"cnn\(kernel_size=...\) must be odd and positive"),
        (lambda: cnn(IMAGES, stride=0), r"cnn\(stride=...\) must be at least 1, got 0"),
        (lambda: cnn(IMAGES, hidden=[0]), r"cnn\(hidden=...\) must hold widths of at least 1"),
        (lambda: vit(TEXT), "vit reads images, not text"),
        (lambda: vit(IMAGES, patch=3), "the image's 8 x 8 pixels, got 3; 1, 2, 4, 8 would"),
        (lambda: vit(IMAGES, width=30), r"vit\(width=...\) must be a multiple of heads=4, got 30"),
        (lambda: vit(IMAGES, depth=0), r"vit\(depth=...\) must be at least 1, got 0"),
        (lambda: vit(IMAGES, pool="max"), r"vit\(pool=...\) must be mean or class, got 'max'"),  # type: ignore[arg-type]
    ],
)
def test_messages(build: Callable[[], Built], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()
