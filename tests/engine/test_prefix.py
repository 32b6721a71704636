"""Frozen layers at the start of a model see each row once, and change no loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.keys import Key

from .models import CASES, built, cross_entropy

ROW = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
LAST = {"mlp": "2.", "vit": "head", "bert": "classifier", "hf_vit": "classifier", "gpt2": "ln_f"}


class Counted(nn.Module):
    """A linear layer that notes how many rows it has seen."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 4), seen

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(len(x))
        if self.seen[-1] == 99:
            raise RuntimeError("too many")
        return self.layer(x).tanh(), {"x": x}


class Net(nn.Module):
    def __init__(self, twice: bool = False, behind: bool = False) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.counted = Counted(self.seen).requires_grad_(False)
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 5)
        self.first.requires_grad_(behind)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        x, rest = self.counted(self.first(x))
        if self.twice:
            x, rest = self.counted(x + rest["x"])
        return self.head(x + rest["x"])


def net(**kind: bool) -> tuple[Net, Engine, Batch, Directions]:
    torch.manual_seed(0)
    model = Net(**kind).double()
    batch = Batch((torch.randn(3, 4, dtype=torch.float64),), torch.tensor([0, 1, 2]))
    engine = Engine(model, cross_entropy, rung="fold")
    with torch.inference_mode():
        family = Directions(Key.root(0), dict(engine.params), 10)
        # Once, because the first time measures how much memory a pass takes.
        engine.losses(batch, ROW, family, torch.arange(10), 0.1)
    model.seen.clear()
    return model, engine, batch, family


def test_each_row_is_seen_once() -> None:
    model, engine, batch, family = net()
    with torch.inference_mode():
        engine.losses(batch, ROW, family, torch.arange(10), 0.1)
    assert model.seen == [3]
    assert "forward" not in vars(model.counted)


@pytest.mark.parametrize("kind", [{"twice": True}, {"behind": True}])
def test_what_is_no_prefix_sees_every_query(kind: dict[str, bool]) -> None:
    model, engine, batch, family = net(**kind)
    with torch.inference_mode():
        engine.losses(batch, ROW, family, torch.arange(10), 0.1)
    assert set(model.seen) == {10}


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, engine, batch, family = net()
    model.seen.extend([0])
    model.counted.seen = Loud()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="too many"):
        engine.losses(batch, ROW, family, torch.arange(10), 0.1)
    assert "forward" not in vars(model.counted)
    assert all(type(value) is nn.Parameter for value in model.parameters())


class Loud(list[int]):
    def append(self, value: int) -> None:
        super().append(99)


@pytest.mark.parametrize("name", list(LAST))
def test_losses_are_those_of_the_reference(name: str) -> None:
    case, model = CASES[name], built(name)
    for parameter, value in model.named_parameters():
        value.requires_grad_(LAST[name] in parameter)
    batch = case.batch(3).to("cpu", torch.float64)
    folded = Engine(model, case.objective, rung="fold")
    reference = Engine(model, case.objective, rung="sequential")
    family = Directions(Key.root(1), dict(folded.params), 10)
    with torch.inference_mode():
        one = folded.losses(batch, ROW, family, torch.arange(10), 0.1)
        other = reference.losses(batch, ROW, family, torch.arange(10), 0.1)
    assert folded._still
    torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
