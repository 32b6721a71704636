"""What is alive while walking, counted storage by storage."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.live import LiveBytes
from fwdlearn.moonwalk import Moonwalk, mlp
from fwdlearn.objectives import cross_entropy

ROWS, WIDTH = 512, 32
ACTIVATION = ROWS * WIDTH * 4


def walking(depth: int, **settings: Any) -> float:
    """Activations alive at the worst moment."""
    chain = mlp(WIDTH, WIDTH, depth, 3, slope=0.8)
    x, targets = torch.ones(ROWS, WIDTH), torch.zeros(ROWS, dtype=torch.int64)
    with LiveBytes() as live:
        for _, gradient in Moonwalk(**settings).walk(chain, x, lambda y: cross_entropy(y, targets)):
            del gradient
    return live.peak / ACTIVATION


def backpropagation(depth: int) -> float:
    chain = mlp(WIDTH, WIDTH, depth, 3, slope=0.8)
    for parameter in chain.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    x, targets = torch.ones(ROWS, WIDTH), torch.zeros(ROWS, dtype=torch.int64)
    with LiveBytes() as live:
        cross_entropy(chain(x), targets).mean().backward()
    return live.peak / ACTIVATION


def test_live_bytes_counts_what_is_alive() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        one = before + 1
        view = one[:10]
        del one
        assert live.now == 4000
        del view
        assert live.now == 0
        before.add_(1)
        both = torch.ones(500), torch.ones(500)
        del both
    assert (live.now, live.peak) == (0, 4000)


def test_memory_grows_with_anchors_and_bits_alone() -> None:
    """An activation for each anchor, one bit in 32 for each unit; gradients of a stretch."""
    slope = (walking(96, anchors=8) - walking(32, anchors=8)) / 64
    assert slope < 1 / 8 + 1 / 32 + 0.01
    assert (backpropagation(96) - backpropagation(32)) / 64 > 0.95


def test_twice_the_depth_in_the_memory_of_backpropagation() -> None:
    assert walking(64, anchors=4) < backpropagation(32)


def test_nested_anchors_take_less() -> None:
    assert walking(96, anchors=(24, 4)) < walking(96, anchors=4) - 10
