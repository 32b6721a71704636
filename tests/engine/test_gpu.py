"""A GPU gives the numbers that a CPU gives: every estimator, float64, on models with every rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.estimator import Estimator
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.laws import LAWS
from fwdlearn.models.recurrent import Recurrent
from fwdlearn.objectives import cross_entropy, mean_squared_error
from fwdlearn.oracle import ModelOracle, TimeOracle
from fwdlearn.registry import entries, load
from fwdlearn.step_oracle import StepOracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Block(nn.Module):
    """Embedding, norm, attention and a convolution: what has a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.project, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        q, k, v = (part.unsqueeze(1) for part in self.project(x).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        x = F.gelu(self.mix(x.transpose(1, 2)))
        return self.head(x.mean(2))


def network() -> nn.Module:
    widths = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    return nn.Sequential(*widths, nn.Linear(8, 3))


def made(name: str) -> tuple[nn.Module, Batch]:
    """A model in float64 and four rows for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "sequence":
            model: nn.Module = Recurrent("elman", 3, (5,), 2)
            values = torch.randn(4, 6, 5).double()
            return model.double(), Batch((values[..., :3],), values[..., 3:].contiguous())
        model = MODELS[name]().double()
        x = torch.randint(11, (4, 5)) if name == "block" else torch.randn(4, 6).double()
        return model, Batch((x,), torch.arange(4) % 3)


MODELS: dict[str, Callable[[], nn.Module]] = {"network": network, "block": Block}


def oracle_of(model: nn.Module, batch: Batch) -> ModelOracle:
    if isinstance(model, Recurrent):
        return StepOracle(TimeEngine(model, mean_squared_error), batch)
    return ModelOracle(Engine(model, cross_entropy), batch)


def example(target: str, number: int) -> Estimator:
    found: Estimator = load(target).examples()[number]
    return found


def gradient(
    model: nn.Module, batch: Batch, estimator: Estimator, counts: int
) -> tuple[dict[str, Tensor], float]:
    oracle = oracle_of(model, batch)
    plan = Plan.uniform(len(batch), counts).to(batch.device)
    state = estimator.init(oracle.params)
    for step in range(2):
        key = Key.root(3).fold(step)
        found, state = estimator.estimate(oracle, oracle.params, state, key=key, plan=plan)
    return {name: value.cpu() for name, value in found.grad.items()}, float(found.loss)


def cases() -> Iterator[Any]:
    for name, entry in entries("estimator").items():
        for number, one in enumerate(load(entry.target).examples()):
            for model in ("sequence",) if one.traits.needs is TimeOracle else MODELS:
                yield pytest.param(entry.target, number, model, id=f"{name}-{number}-{model}")


@pytest.mark.parametrize(("target", "number", "model"), list(cases()))
def test_estimates_agree(target: str, number: int, model: str) -> None:
    here, batch = made(model)
    there = copy.deepcopy(here).cuda()
    expected, loss = gradient(here, batch, example(target, number), 4)
    found, found_loss = gradient(there, batch.to("cuda"), example(target, number), 4)
    assert found_loss == pytest.approx(loss, rel=1e-9)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # Differences of losses over sigma lose some six of sixteen digits.
        assert (found[name] - value).norm() <= 1e-6 * (1e-12 + value.norm()), name


@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_summed_in_float32(dtype: torch.dtype, law: str, rank: int | None) -> None:
    weights = {"matrix": torch.zeros(40, 24, dtype=dtype), "vector": torch.zeros(9, dtype=dtype)}
    slopes = torch.linspace(-2, 3, 50, dtype=torch.float64)
    sums = []
    for device in ("cpu", "cuda"):
        there = {name: value.to(device) for name, value in weights.items()}
        family = Directions(Key.root(0), there, 50, law=law, rank=rank)
        sums.append(dict(DirectionGradient(family, slopes.to(device))))
    for name, value in sums[0].items():
        assert sums[1][name].dtype == torch.float32
        # Normal numbers are rounded to a short dtype by each backend on its own.
        close = 1e-6 if law == "rademacher" or dtype == torch.float32 else 1e-2
        assert (sums[1][name].cpu() - value).norm() <= close * value.norm(), name


@pytest.mark.parametrize("rung", ["fold", "copies", "sequential"])
@pytest.mark.parametrize("model", MODELS)
def test_every_rung_runs(model: str, rung: str) -> None:
    here, batch = made(model)
    losses = []
    for device, used in (("cpu", "auto"), ("cuda", rung)):
        engine = Engine(copy.deepcopy(here).to(device), cross_entropy, rung=used)
        oracle = ModelOracle(engine, batch.to(device))
        plan = Plan.uniform(4, 3).to(device)
        family = Directions(Key.root(0), oracle.params, plan.directions)
        losses.append(oracle.losses(plan.row, family, plan.direction, 1e-3).cpu())
    assert (losses[0] - losses[1]).abs().max() <= 1e-10
