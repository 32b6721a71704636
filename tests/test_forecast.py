"""What `explain` says: bytes counted exactly, speed of whole steps, nothing changed by asking."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fwdlearn.allocators import Uniform
from fwdlearn.cli.tables import explanation
from fwdlearn.data import Data, DataInfo, Rows
from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.estimators import RandomPerturbation
from fwdlearn.forecast import Step, _with_offload, counted, timed
from fwdlearn.objectives import cross_entropy
from fwdlearn.optim import FrankWolfe
from fwdlearn.optim.sets import L2Ball
from fwdlearn.trainer import Trainer

CPU = torch.device("cpu")
# The largest of the weights has 300 x 200 numbers.
LARGEST = 4 * 300 * 200


def trainer(optimizer: Any = torch.optim.Adam, **settings: Any) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 200, generator=generator)
    y = torch.randint(0, 4, (80,), generator=generator)
    data = Data(DataInfo("features", (200,), 4), Rows(x[:40], y[:40]), Rows(x[40:], y[40:]))
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 4))
    made = optimizer(model.parameters(), **settings.pop("optimizer_settings", {"lr": 0.1}))
    rank = settings.pop("rank", 1)
    parts = (cross_entropy, RandomPerturbation(rank=rank), Uniform(4), made)
    return Trainer(model, data, *parts, **{"batch_size": 8, "steps": 3, **settings})


@pytest.fixture(autouse=True)
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fwdlearn.forecast.timed", partial(timed, seconds=0.0))


def parts(run: Trainer) -> tuple[Any, ...]:
    state, plans = run.estimator.init(run.engine.params), run.allocator.init()
    run._choose()
    return lambda: run._estimate(0, state, plans)[0].estimate, run.engine.params, run.optimizer


@pytest.mark.parametrize(
    ("optimizer", "settings", "kept"),
    [
        (torch.optim.SGD, {"lr": 0.1}, 0),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1),
        (torch.optim.Adam, {"lr": 0.1}, 2),
        (FrankWolfe, {"set": L2Ball(1e3)}, 1),
    ],
)
def test_what_an_optimizer_keeps(optimizer: Any, settings: dict[str, Any], kept: int) -> None:
    run = trainer(optimizer, optimizer_settings=settings)
    weights = sum(4 * p.numel() for p in run.model.parameters())
    taken = counted(*parts(run), CPU)
    # Counters of steps are tensors of one number.
    assert kept * weights <= taken.optimizer <= kept * weights + 4 * 4 * 4
    assert not run.optimizer.state


def test_a_factored_state_is_counted_as_it_is() -> None:
    taken = counted(*parts(trainer(torch.optim.Adafactor)), CPU)
    assert 4 * (300 + 200 + 300 + 4 + 300 + 4) <= taken.optimizer < LARGEST / 10


def test_a_step_is_a_block_and_what_is_held_or_the_largest_gradient() -> None:
    run = trainer(torch.optim.SGD)
    taken = counted(*parts(run), CPU)
    queries = 8 * 4
    # One bit a number of the directions, kept in words of 128, or written out.
    numbers = queries * (200 + 300 + 300 + 300 + 4 + 4)
    assert numbers / 8 < taken.held < 6 * numbers
    block = max(f.bytes(min(rows, queries)) for f, rows in run.engine.blocks._known.values())
    assert taken.estimate == pytest.approx(taken.held + block, rel=0.25)
    assert LARGEST <= taken.update < 2.5 * LARGEST
    assert taken.peak == max(taken.estimate, taken.held + taken.update)


def test_the_model_of_a_step_is_what_a_real_step_takes() -> None:
    """Byte for byte of live tensors, but for the vectors of a query."""
    run = trainer(torch.optim.SGD)
    made = parts(run)
    taken = counted(*made, CPU)
    for _ in range(2):
        with LiveBytes(CPU) as live:
            estimate = made[0]()
            run._update(estimate, run.engine.params)
        del estimate
    assert live.peak == pytest.approx(taken.peak, rel=0.05)


def test_asking_changes_nothing() -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    run = trainer()
    run.schedule = schedule(run.optimizer, T_max=3)
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    generator = torch.get_rng_state()
    facts = run.explain()
    json.dumps(facts)
    after = run.model.state_dict(), run.optimizer.state_dict()
    for name, value in before[0].items():
        assert torch.equal(after[0][name], value), name
    assert before[1] == after[1]
    assert all(p.grad is None for p in run.model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_parts_add_up() -> None:
    facts = trainer(evaluation_batch_size=16).explain()
    named = facts["memory_parts"]
    always = named["process"] + named["weights"] + named["optimizer"]
    most = max(named["estimate"], named["update"], named["evaluation"])
    assert facts["memory_bytes"] >= always + most
    # Rows, and what the two layers make of them.
    assert 4 * 16 * (200 + 300) <= named["evaluation"] <= 4 * 16 * (200 + 3 * 300)
    assert trainer(evaluation_batch_size=8).explain()["memory_parts"]["evaluation"] < (
        0.6 * named["evaluation"]
    )


def test_speed_counts_the_update() -> None:
    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            time.sleep(0.02)
            super().step()

    def speed(optimizer: Any) -> float:
        return timed(*parts(trainer(optimizer)), seconds=0.05)

    assert speed(Slow) < 0.7 * speed(torch.optim.SGD)


def test_a_budget_is_obeyed_by_the_whole_step() -> None:
    free, tight = trainer(), trainer(memory_budget=60_000)
    few, many = (run.explain()["memory_parts"]["estimate"] for run in (tight, free))
    held = counted(*parts(tight), CPU).held
    assert few < held + 70_000 < many


PEAK = """
import json, sys
from fwdlearn.data import Data, DataInfo, Rows
from fwdlearn.allocators import Uniform
from fwdlearn.estimators import RandomPerturbation
from fwdlearn.objectives import cross_entropy
from fwdlearn.trainer import Trainer
import torch
from torch import nn

x, y = torch.randn(64, 50, 128), torch.randint(0, 4, (64,))
data = Data(DataInfo("features", (50, 128), 4), Rows(x, y), Rows(x, y))
model = nn.Sequential(nn.Linear(128, 6000), nn.Tanh(), nn.Flatten(), nn.Linear(300000, 4))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
run = Trainer(model, data, cross_entropy, RandomPerturbation(), Uniform(2), optimizer,
              batch_size=32, steps=3, evaluation_batch_size=64)
found = run.explain()["memory_bytes"] if sys.argv[1] == "ask" else run.train()["memory.peak_bytes"]
print(found)
"""


@pytest.mark.slow
def test_the_peak_of_a_process_is_foretold() -> None:
    """160 MB of activations in an evaluation: not to be missed beside an empty process."""

    def said(how: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", PEAK, how], capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    assert said("ask") == pytest.approx(said("run"), rel=0.15)


def deep(offload: str | None) -> Trainer:
    """Eight layers of the same size, of which one at a time is used."""
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    data = Data(DataInfo("features", (128,), 128), Rows(x, torch.arange(16)))
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(8)))
    made = torch.optim.Adam(model.parameters(), lr=0.1)
    parts = (cross_entropy, RandomPerturbation(), Uniform(1), made)
    return Trainer(model, data, *parts, batch_size=2, steps=3, offload=offload)


WEIGHTS = 8 * 4 * (128 * 128 + 128)


def test_where_weights_are_is_told(tmp_path: Any) -> None:
    resident, copied, mapped = (deep(where).explain() for where in (None, "cpu", str(tmp_path)))
    assert resident["fits"]
    assert copied["fits"]
    assert mapped["fits"]
    assert (resident["offload"], copied["offload"], mapped["offload"]) == (
        None,
        "cpu",
        str(tmp_path),
    )
    # On a CPU, host memory is where weights are anyway.
    assert resident["offloaded_bytes"] == copied["offloaded_bytes"] == 0
    assert resident["memory_parts"]["weights"] == copied["memory_parts"]["weights"] == WEIGHTS
    assert mapped["memory_parts"]["weights"] == mapped["memory_parts"]["optimizer"] == 0
    # The moments of Adam, and a count for each parameter.
    assert 3 * WEIGHTS <= mapped["offloaded_bytes"] <= 3 * WEIGHTS + 16 * 8
    layer = WEIGHTS // 8
    more = copied["memory_parts"]["estimate"] - resident["memory_parts"]["estimate"]
    assert 0 < more <= layer
    # A weight and its moments are there for the time of its update.
    more = copied["memory_parts"]["update"] - resident["memory_parts"]["update"]
    assert 2.9 * layer < more <= 3.1 * layer


def test_a_run_with_offload_takes_what_is_foretold() -> None:
    run = deep("cpu")
    taken = counted(*parts(run), CPU, brought=True)
    for _ in range(2):
        with LiveBytes(CPU) as live:
            estimate = run._estimate(0, None, None)[0].estimate
            run._update(estimate, run.engine.params)
        del estimate
    assert live.peak == pytest.approx(taken.peak, rel=0.05)


def test_a_run_that_does_not_fit_is_told_what_offload_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fwdlearn.forecast.free_bytes", lambda device: 0)
    facts = deep(None).explain()
    assert not facts["fits"]
    assert facts["with_offload_bytes"] < facts["memory_bytes"]
    lines = dict(explanation(facts))
    assert lines["weights"] == "on cpu"
    assert lines["fits"].startswith("no: there are ")
    assert lines["with offload"].endswith(": set trainer.offload=FOLDER")
    assert not set(lines) & {"device", "offload", "offloaded bytes", "memory room bytes"}


def test_room_on_a_gpu_is_for_two_weights_and_a_block() -> None:
    run, taken = deep(None), Step(estimate=10_000, held=1_000, update=2_000, optimizer=2 * WEIGHTS)
    assert _with_offload(run, taken, 500) == 10_000
    run.device = "cuda"
    largest = 4 * 128 * 128
    assert _with_offload(run, taken, 500) == max(10_000 + 2 * largest, 3_000 + 3 * largest)
