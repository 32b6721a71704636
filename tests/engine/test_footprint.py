"""The memory of a pass: what is counted, how it grows with the rows, what a block may take."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine, blocks
from fwdlearn.engine.footprint import Footprint, LiveBytes, footprint
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

from .models import CASES, built, cross_entropy, features

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_graph() -> Iterator[None]:
    with torch.inference_mode():
        yield


def live(run: Callable[[], object]) -> LiveBytes:
    with LiveBytes(CPU) as counted:
        run()
    return counted


def mlp_losses(engine: Engine, batch: Batch, count: int, rank: int | None = 1) -> Tensor:
    family = Directions(Key.root(0), dict(engine.params), 64, rank=rank)
    _ = family.expanded
    row = torch.arange(count) % len(batch)
    return engine.losses(batch, row, family, torch.arange(count) % 64, 0.01)


def test_live_bytes_are_those_of_tensors_made_inside_and_not_yet_freed() -> None:
    before = torch.zeros(100)
    with LiveBytes(CPU) as counted:
        before += 1
        assert counted.now == 0
        kept = before + 1
        assert counted.now == 400
        view = kept[10:]
        del kept
        assert counted.now == 400
        view.resize_(200)
        assert counted.now == 4 * 210
        del view
        assert counted.now == 0
        # The product is made beside the sum, inside one composite operation.
        out = torch.linalg.vecdot(before.expand(10, 100), before.expand(10, 100))
        assert counted.now == 40
    assert counted.peak == 4000 + 40
    del out
    assert counted.now == 0


@pytest.mark.slow
def test_it_agrees_with_the_allocator() -> None:
    """Byte for byte, on what torch's own profiler says of a transformer and of the fold."""
    case, model = CASES["bert"], built("bert", torch.float32)
    batch = case.batch(6)
    engine = Engine(model, case.objective)
    engine.choose(batch)
    family = Directions(Key.root(0), dict(engine.params), 64)
    row = torch.arange(12) % 6

    def run() -> None:
        engine.losses(batch, row, family, torch.arange(12), 0.01)

    run()
    counted = live(run).peak
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    sizes = [
        (event.start_time_ns, event.extra_fields.alloc_size)
        for event in walk(profile.profiler.kineto_results.experimental_event_tree())
        if event.name == "[memory]"
    ]
    now = peak = 0
    for _, size in sorted(sizes):
        now += size
        peak = max(peak, now)
    assert peak == pytest.approx(counted, rel=0.01)


def walk(events: list) -> Iterator:  # type: ignore[type-arg]
    for event in events:
        yield event
        yield from walk(event.children)


@pytest.mark.parametrize("name", ["mlp", "bert", "cnn", "multihead_attention"])
def test_the_peak_of_many_rows_follows_from_few(name: str) -> None:
    case, model = CASES[name], built(name, torch.float32)
    batch = case.batch(6)

    def run(rows: int) -> object:
        some = batch.select(torch.arange(rows) % 6)
        return case.objective(model(*some.args, **some.kwargs), some.targets)

    taken = footprint(run, CPU)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for rows in (1, 5, 37):
            assert taken.bytes(rows) == pytest.approx(live(partial(run, rows)).peak, rel=0.02)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_highest_moment_may_change_with_the_rows() -> None:
    weight = torch.zeros(1000, 10)

    def run(rows: int) -> None:
        # 40 kB whatever the rows, then 400 bytes a row and 40 more.
        del_me = weight + 1
        del del_me
        wide = torch.zeros(rows, 100)
        wide[:, :10].clone()

    taken = footprint(run, CPU)
    assert [taken.bytes(rows) for rows in (1, 90, 91, 1000)] == [40_000, 40_000, 40_040, 440_000]
    assert taken.rows(39_999) == 0 and taken.rows(44_000) == 100
    assert len(taken.lines) == 2


def test_other_operations_for_other_rows_leave_the_peaks() -> None:
    def run(rows: int) -> None:
        kept = [torch.zeros(100) for _ in range(rows)]
        del kept

    assert footprint(run, CPU).bytes(50) == 50 * 400


def test_without_lines_there_is_no_bound() -> None:
    assert Footprint(()).bytes(5) == 0
    assert Footprint(((8.0, 0.0),)).rows(8) > 10**9


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("budget", [40_000, 100_000, 1_000_000])
def test_blocks_are_as_large_as_the_budget_allows(budget: int, rank: int | None) -> None:
    """Counted in a pass over several blocks: never over the budget, never far below it."""
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 5))
    engine = Engine(model, cross_entropy, memory_budget=budget if rank else 10 * budget)
    batch = features(6)
    budget = engine.memory_budget or 0
    mlp_losses(engine, batch, 8, rank)
    (kind, (taken, rows)) = list(engine.blocks._known.items())[-1]
    assert kind[0] != "plain" and 1 <= rows < 2000  # type: ignore[index]
    assert taken.bytes(rows) <= budget < taken.bytes(rows + 1)
    family = Directions(Key.root(0), dict(engine.params), 64, rank=rank)
    _ = family.expanded
    count = 3 * rows
    row, direction = torch.arange(count) % 6, torch.arange(count) % 64
    run = lambda: engine.losses(batch, row, family, direction, 0.01)  # noqa: E731
    run()
    # The losses, and which queries they are, are no part of a block.
    outside = 100 * count
    assert 0.7 * budget - outside < live(run).peak < budget + outside


def test_a_budget_that_holds_no_row_is_refused() -> None:
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 5))
    engine = Engine(model, cross_entropy, memory_budget=300)
    batch = features(6)
    with pytest.raises(UsageError, match=r"memory_budget=300 is too little: one row takes \d+ "):
        mlp_losses(engine, batch, 8)
    needed = int(pytest.raises(UsageError, engine.block, batch).value.args[0].split()[-11])
    assert Engine(model, cross_entropy, memory_budget=needed).block(batch) == 1


def test_free_memory_bounds_a_block_that_has_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 5))
    batch = features(6)
    sizes = {}
    for free in (None, 2**40, 2**16, 1):
        monkeypatch.setattr(blocks, "free_bytes", lambda _, free=free: free)
        sizes[free] = Engine(model, cross_entropy).block(batch)
    assert sizes[None] == sizes[2**40] > sizes[2**16] > sizes[1] == 1


def test_a_block_depends_on_shapes_and_not_on_what_came_before() -> None:
    case, model = CASES["bert"], built("bert", torch.float32)
    short, long = (
        case.batch(6).map(lambda t, n=n: t[:, :n] if t.dim() == 2 else t) for n in (2, 5)
    )
    one = Engine(model, case.objective, memory_budget=2**20)
    other = Engine(model, case.objective, memory_budget=2**20)
    assert [one.block(short), one.block(long)] == [other.block(long), other.block(short)][::-1]
    assert one.block(short) > one.block(long)
    assert one.block(short.select(torch.arange(2))) == one.block(short)


def test_fused_layers_are_measured_in_parts() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True).eval()
    x = torch.zeros(8, 10, 32)
    taken = footprint(lambda rows: layer(x[:rows]), CPU)
    assert taken.bytes(1) > 10 * (64 + 64) * 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_dropout_and_generators_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(10, 64), nn.Dropout(), nn.Linear(64, 5)).train()
    batch = features(6)
    before = torch.get_rng_state()
    engine = Engine(model, cross_entropy)
    row = torch.arange(6)
    engine.losses(batch, row, dropout=Key.root(3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_agrees_with_the_allocator_of_a_gpu() -> None:
    device = torch.device("cuda")
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 10)).to(device)
    x = torch.zeros(512, 512, device=device)

    def run(rows: int) -> object:
        return F.log_softmax(model(x[:rows]), 1)

    taken = footprint(run, device)
    run(256)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(256)
    measured = torch.cuda.max_memory_allocated() - before
    assert taken.bytes(256) == pytest.approx(measured, rel=0.02)


def test_counting_imports_no_compiler() -> None:
    code = (
        "import sys, torch; from fwdlearn.engine.footprint import LiveBytes\n"
        "with LiveBytes(torch.device('cpu')): torch.linalg.vecdot(torch.ones(3), torch.ones(3))\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lines_are_data() -> None:
    assert dataclasses.is_dataclass(Footprint)
    assert Footprint.highest([Footprint(((0.0, 2.0),)), Footprint(((1.0, 1.0), (5.0, 0.0)))]) == (
        Footprint(((5.0, 0.0), (0.0, 2.0)))
    )
