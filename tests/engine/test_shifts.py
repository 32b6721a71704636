"""What noise changes at every layer: measured as by hooks on two passes, and flat in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import SiteNoise
from fwdlearn.oracle import ActivationOracle, ModelOracle

from .models import CASES, built

ROW = torch.tensor([0, 0, 1, 1, 1, 2, 3])
INDEX = torch.tensor([0, 1, 2, 2, 3, 4, 0])
SCALE = torch.tensor([0.03, -0.03, 0.01, 0.02, 0.0, -0.01, -0.03], dtype=torch.float64)


def oracle_of(name: str, **settings: Any) -> ModelOracle:
    case = CASES[name]
    engine = Engine(built(name, torch.float64), case.objective, **settings)
    return ModelOracle(engine, case.batch(4).to("cpu", torch.float64))


def whole(oracle: ActivationOracle, noise: SiteNoise) -> tuple[Tensor, dict[str, Tensor], int]:
    """Losses and shifts of all queries, and in how many blocks they came."""
    clean = oracle.clean(outputs=True)
    blocks = list(oracle.noisy_shifts(clean, ROW, noise, INDEX, SCALE))
    assert [block.queries.start for block in blocks[1:]] == [b.queries.stop for b in blocks[:-1]]
    names = blocks[0].outputs
    shifts = {name: torch.cat([block.outputs[name] for block in blocks]) for name in names}
    return torch.cat([block.losses for block in blocks]), shifts, len(blocks)


@pytest.mark.parametrize("name", list(CASES))
def test_losses_are_noisy_losses_and_nothing_changes_without_noise(name: str) -> None:
    oracle = oracle_of(name)
    noise = SiteNoise(Key.root(1), oracle.sites, 5)
    start = oracle.queries
    losses, shifts, _ = whole(oracle, noise)
    assert oracle.queries - start == 4 + len(ROW)
    assert list(shifts) == list(oracle.sites)
    expected = oracle.noisy_losses(ROW, noise, INDEX, SCALE)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    for site, value in shifts.items():
        assert value.shape == (len(ROW), *oracle.sites[site].shape)
        assert value[SCALE == 0].abs().max() < 1e-10
        assert (value[SCALE != 0].flatten(1).norm(dim=1) > 1e-6).all(), site


class Inplace(nn.Module):
    """Overwrites what its layers have put out, and uses one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(3, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        x = self.again(x).tanh_()
        return self.last(self.again(x).mul_(2))


def test_shifts_by_hand() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, x = Inplace().double(), torch.randn(4, 3).double()
    engine = Engine(model, lambda output, targets: output.square().sum(1))
    oracle = ModelOracle(engine, Batch((x,), torch.zeros(4)))
    noise = SiteNoise(Key.root(1), oracle.sites, 5, scales={"again.weight#1": 0.5})
    _, shifts, _ = whole(oracle, noise)

    def outputs(x: Tensor, added: Any) -> list[Tensor]:
        first = model.first(x) + added("first.weight")
        again = model.again(first.relu()) + added("again.weight")
        more = model.again(again.tanh()) + added("again.weight#1")
        return [first, again, more, model.last(more * 2) + added("last.weight")]

    with torch.no_grad():
        noisy = outputs(x[ROW], lambda site: SCALE[:, None] * noise.dense(site, INDEX))
        clean = outputs(x[ROW], lambda site: 0.0)
    for site, up, down in zip(shifts, noisy, clean, strict=True):
        torch.testing.assert_close(shifts[site], up - down, rtol=1e-10, atol=1e-13)


def test_noise_in_one_layer_shows_from_there_on() -> None:
    oracle = oracle_of("mlp")
    sites = list(oracle.sites)
    _, shifts, _ = whole(oracle, SiteNoise(Key.root(1), oracle.sites, 5, only=sites[1:2]))
    assert shifts[sites[0]].abs().max() < 1e-12
    assert all(shifts[site][SCALE != 0].abs().max() > 1e-4 for site in sites[1:])


def test_blocks_follow_memory_and_change_nothing() -> None:
    ample, tight = oracle_of("cnn"), oracle_of("cnn", memory_budget=200_000)
    noise = SiteNoise(Key.root(1), ample.sites, 5)
    one, two = whole(ample, noise), whole(tight, noise)
    assert one[2] == 1 and two[2] > 1
    torch.testing.assert_close(one[0], two[0], rtol=1e-12, atol=0)
    for site in one[1]:
        torch.testing.assert_close(one[1][site], two[1][site], rtol=1e-9, atol=1e-12)


def test_single_precision_and_narrower_are_measured_in_single() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    engine = Engine(model, lambda output, targets: output.float().sum(1))
    oracle = ModelOracle(engine, Batch((torch.ones(4, 3).to(torch.bfloat16),), torch.zeros(4)))
    _, shifts, _ = whole(oracle, SiteNoise(Key.root(1), oracle.sites, 5))
    assert {value.dtype for value in shifts.values()} == {torch.float32}


def test_the_outputs_must_have_been_kept() -> None:
    oracle = oracle_of("mlp")
    noise = SiteNoise(Key.root(1), oracle.sites, 5)
    assert not oracle.clean().outputs
    with pytest.raises(UsageError, match=r"has not kept .*; make it by clean\(outputs=True\)"):
        list(oracle.noisy_shifts(oracle.clean(), ROW, noise, INDEX, SCALE))
