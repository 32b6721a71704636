"""A compiled folded pass gives the losses of the plain one."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

from .models import CASES, built, cross_entropy, features

ROW = torch.arange(6).repeat_interleave(3)


def both(name: str, backend: str, dtype: torch.dtype, shared: bool):
    case, model = CASES[name], built(name, dtype)
    batch = case.batch(6).to("cpu", dtype)
    direction = torch.arange(18) % 3 if shared else torch.arange(18)
    engine = Engine(model, case.objective, rung="fold", compile=backend)
    plain = Engine(model, case.objective, rung="fold")
    family = Directions(Key.root(1), dict(engine.params), 18)
    losses = []
    for one in (engine, plain):
        with torch.inference_mode():
            losses.append(one.losses(batch, ROW, family, direction, 0.03))
    return engine, *losses


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("name", ["mlp", "vit", "cnn"])
def test_a_captured_pass_gives_the_same_losses(name: str, shared: bool) -> None:
    engine, one, other = both(name, "eager", torch.float64, shared)
    assert engine.compiled is not None and engine.compiled.refusal is None
    assert engine.compiled.graphs
    torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


@pytest.mark.slow  # the compiler alone takes most of a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_a_compiled_pass_gives_the_same_losses(name: str) -> None:
    engine, one, other = both(name, "inductor", torch.float32, False)
    assert engine.compiled is not None and engine.compiled.refusal is None
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_a_model_that_looks_at_its_data_is_not_compiled() -> None:
    """A mask that is left out where nothing is padded: a graph would fix what one batch chose."""
    engine, one, other = both("bert", "eager", torch.float64, False)
    assert engine.compiled is not None and "data-dependent" in (engine.compiled.refusal or "")
    assert engine.events[-1].reason.startswith("not compiled: ")
    assert torch.equal(one, other)


def test_weights_and_directions_are_inputs_and_counts_make_few_graphs() -> None:
    case, model = CASES["mlp"], built("mlp")
    batch = case.batch(6).to("cpu", torch.float64)
    engine = Engine(model, case.objective, rung="fold", compile="eager")
    plain = Engine(model, case.objective, rung="fold")
    for step, count in enumerate((18, 17, 11, 18, 9)):
        with torch.no_grad():
            next(iter(model.parameters())).add_(0.1)
        family = Directions(Key.root(step), dict(engine.params), count)
        with torch.inference_mode():
            asked = (batch, ROW[:count], family, torch.arange(count), 0.01 * (step + 1))
            torch.testing.assert_close(
                engine.losses(*asked), plain.losses(*asked), rtol=1e-10, atol=0
            )
    assert engine.compiled is not None and len(engine.compiled.graphs) == 2


def test_what_cannot_be_compiled_says_why_and_goes_on() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.Dropout(0.5), nn.Linear(8, 5)).train()
    engine = Engine(model, cross_entropy, compile="eager")
    family = Directions(Key.root(0), dict(engine.params), 6)
    with torch.inference_mode():
        engine.losses(features(6), torch.arange(6), family, torch.arange(6), 0.1, Key.root(1))
    assert engine.events[-1].reason == "not compiled: dropout is drawn anew in every pass"
    assert engine.events[-1].rung == "fold"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="compile must be"):
        Engine(nn.Linear(2, 2), cross_entropy, compile="fast")
