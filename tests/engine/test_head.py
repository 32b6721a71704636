"""Derivatives by what a model puts out are autograd's, wherever the rows lie in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fwdlearn.engine import head
from fwdlearn.engine.head import by_output
from fwdlearn.engine.trace import Rows


def _own(output: Tensor) -> Tensor:
    """A loss for each row, of rows on axis 0."""
    return (torch.sin(output) * torch.arange(1.0, 13).view(4, 3).to(output)).flatten(1).sum(1)


def _looking(output: Tensor) -> Tensor:
    """It asks for a number, which `vmap` refuses."""
    return _own(output) if output.detach().sum().item() < 1e9 else output.new_zeros(len(output))


@pytest.mark.parametrize("losses", [_own, _looking])
@pytest.mark.parametrize("at_once", [1, 100, 10_000])
@pytest.mark.parametrize("axis", [0, 1])
def test_they_are_autograds(
    losses: Callable[[Tensor], Tensor], at_once: int, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_AT_ONCE", at_once)
    chance = torch.Generator().manual_seed(0)
    output = torch.randn(5, 4, 3, dtype=torch.float64, generator=chance).movedim(0, axis)
    laid = output.detach().clone().requires_grad_()

    def run(value: Tensor) -> Tensor:
        return losses(value.movedim(axis, 0))

    run(laid).sum().backward()
    assert laid.grad is not None
    with torch.no_grad():
        found = by_output(run, output, 5, Rows(axis))
    torch.testing.assert_close(found, laid.grad.movedim(axis, 0), rtol=1e-12, atol=0)
    assert float(found.abs().min()) > 0
