"""Networks that run step by step, and batches of sequences for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.keys import Key
from fwdlearn.models.recurrent import Recurrent
from fwdlearn.steps import State


class Feedback(nn.Module):
    """What goes out comes in again at the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(2 + 2, 6)
        self.head = nn.Linear(6, 2)

    def initial(self, rows: int) -> State:
        return {"before": self.head.weight.new_zeros(rows, 2)}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        out = self.head(torch.tanh(self.cell(torch.cat((x, state["before"]), 1))))
        return out, {"before": out}

    def forward(self, x: Tensor) -> Tensor:
        return unrolled(self, x)


class Learned(nn.Module):
    """Its first state is a parameter, and a weight is worked out anew at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(5) / 3)
        self.direction = nn.Parameter(torch.ones(5, 5))
        self.size = nn.Parameter(torch.ones(5, 1))
        self.inputs = nn.Linear(2, 5)

    def initial(self, rows: int) -> State:
        return {"h": self.start.expand(rows, -1)}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        weight = self.size * self.direction
        h = torch.tanh(self.inputs(x) + F.linear(state["h"], weight))
        return h[:, :2], {"h": h}

    def forward(self, x: Tensor) -> Tensor:
        return unrolled(self, x)


class Torchs(nn.Module):
    """A cell of torch's own, one operation that no rule is for, and a state that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2, 4), nn.Linear(4, 2)

    def initial(self, rows: int) -> State:
        zero = self.head.weight.new_zeros(rows, 4)
        return {"h": zero, "c": zero, "t": torch.zeros(rows, dtype=torch.int64)}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = self.cell(x, (state["h"], state["c"]))
        out = self.head(h) * (1 + state["t"] % 2).unsqueeze(1).to(h.dtype)
        return out, {"h": h, "c": c, "t": state["t"] + 1}

    def forward(self, x: Tensor) -> Tensor:
        return unrolled(self, x)


class Mixing(nn.Module):
    """Its state is centred over the rows of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def initial(self, rows: int) -> State:
        return {"h": self.layer.weight.new_zeros(rows, 2)}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h = self.layer(x + state["h"])
        return h, {"h": h - h.mean(0)}


def unrolled(model: Any, x: Tensor) -> Tensor:
    """[rows, steps, outputs]."""
    state, out = model.initial(len(x)), []
    for step in range(x.shape[1]):
        y, state = model.step(x[:, step], state)
        out.append(y)
    return torch.stack(out, 1)


class Stepwise(nn.Module):
    """Whatever `forward` of a model may be: its steps, one after the other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters, self._modules = model._parameters, model._modules
        self.inner = [model]

    def forward(self, x: Tensor) -> Tensor:
        return unrolled(self.inner[0], x)


def cell(name: str, *widths: int) -> Callable[[], nn.Module]:
    return lambda: Recurrent(name, 2, widths, 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "elman": cell("elman", 6),
    "gru": cell("gru", 5),
    "lstm": cell("lstm", 4, 3),
    "minimal": cell("minimal", 5, 4),
    "feedback": Feedback,
    "learned": Learned,
}


def built(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """With weights that come from a seed and are large enough to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = make().to(dtype)
        for value in model.parameters():
            value.data.add_(torch.randn_like(value) * 0.4)
    return model


def numbers(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    size = torch.Size(shape).numel()
    return (Key.root(11).uniform(size, name) * 2 - 1).reshape(shape).to(dtype)


def sequences(rows: int = 4, steps: int = 7, dtype: torch.dtype = torch.float64) -> Batch:
    """Inputs and targets [rows, steps, 2], of which some do not count."""
    targets = numbers("targets", rows, steps, 2, dtype=dtype)
    targets[0, :3] = torch.nan
    targets[:, 1] = torch.nan
    return Batch((numbers("inputs", rows, steps, 2, dtype=dtype),), targets)
