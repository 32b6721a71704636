"""What chance decides depends on names alone: not on threads, blocks, memory or (signs) the device.

Losses and sums of floating point may differ by rounding; the numbers that go into them may not.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine.blocks import Blocks
from fwdlearn.engine.dropout import KeyedDropout
from fwdlearn.factors import Factors, LowRank
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.noise import Output, SiteNoise

from .models import CASES, built

ROOT = Path(__file__).parents[2]
LAWS = ("rademacher", "gaussian")


def point(device: str = "cpu") -> dict[str, Tensor]:
    """Large enough that torch divides the work among threads, and no multiple of anything."""
    shapes = {"w": (307, 211), "long": (40_001,), "bias": (307,), "gain": ()}
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float64)
    return {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }


def drawn(law: str, rank: int | None, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Packed words, factors, noise of layers and masks of dropout."""
    family = Directions(Key.root(1), point(device), 9, law, rank)
    ids = torch.tensor([8, 0, 3, 3], device=device)
    yield "raw", family.raw(slice(None), 0, 500)
    for name in family.params:
        found = family.factors(name, ids)
        for part in (found.left, found.right) if isinstance(found, LowRank) else (found,):
            yield name, part
    sites = {"layer": Output((37, 211), torch.float32, ("w",))}
    noise = SiteNoise(Key.root(2), sites, 9, law)
    yield "noise", noise.dense("layer", ids)
    rows = torch.randn(4, 37, 211, generator=torch.Generator().manual_seed(0)).to(device)
    noise.add(rows, "layer", ids, torch.full((4,), 0.5, dtype=torch.float64, device=device))
    yield "noisy", rows
    with KeyedDropout(Key.root(3), ids):
        yield "dropout", nn.functional.dropout(torch.ones(4, 9001, device=device), 0.3)


def digest(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def report() -> dict[str, Any]:
    """Digests of what is drawn; and losses and gradients, which are sums."""
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for law in LAWS:
        for rank in (1, None):
            for number, (name, value) in enumerate(drawn(law, rank)):
                found[f"{law} {rank} {number} {name}"] = digest(value)
        found[f"losses {law}"] = losses(law).tolist()
    return found


def losses(law: str) -> Tensor:
    case, model = CASES["vit"], built("vit", torch.float32)
    engine = Engine(model, case.objective, "fold")
    family = Directions(Key.root(1), dict(engine.params), 12, law)
    with torch.inference_mode():
        return engine.losses(case.batch(6), torch.arange(12) % 6, family, torch.arange(12), 0.01)


def test_the_number_of_threads_changes_nothing_but_sums() -> None:
    reports = []
    for threads in (1, 3):
        command = (
            "import json; from tests.engine import test_invariance as t; "
            "print(json.dumps(t.report()))"
        )
        settings = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        ended = subprocess.run(
            [sys.executable, "-c", command],
            cwd=ROOT,
            env={**os.environ, **settings, "MKL_DYNAMIC": "FALSE"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr
        reports.append(json.loads(ended.stdout.splitlines()[-1]))
    assert [one.pop("threads") for one in reports] == [1, 3]
    one, other = reports
    assert len(one) > 30 and other.keys() == one.keys()
    for name, value in one.items():
        if name.startswith("losses"):
            assert other[name] == pytest.approx(value, rel=1e-5)
        else:
            assert other[name] == value, name


class Recorded(Directions):
    """Writes down what it hands out: (parameter, direction) -> digests."""

    def at(self, ids: Tensor | slice, together: bool = True) -> Factors:
        return _Recorded(self, ids, together)


class _Recorded(Factors):
    def __getitem__(self, name: str) -> LowRank | Tensor:
        found = super().__getitem__(name)
        seen = self.family.__dict__.setdefault("seen", {})
        parts = (found.left, found.right) if isinstance(found, LowRank) else (found,)
        numbers = torch.arange(self.family.count)[self.ids].tolist()
        for place, number in enumerate(numbers):
            told = tuple(digest(part[place]) for part in parts)
            assert seen.setdefault((name, number), told) == told
        return found


@pytest.mark.parametrize("law", LAWS)
def test_blocks_and_budgets_see_the_same_numbers(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the fold by blocks of several sizes, in the reference, in the update."""
    case, model = CASES["mlp"], built("mlp", torch.float32)
    batch, row = case.batch(6).to("cpu", torch.float32), torch.arange(36) % 6
    direction = torch.arange(36) // 2
    told, sums = [], []

    def ask(engine: Engine) -> None:
        family = Recorded(Key.root(1), dict(engine.params), 18, law)
        with torch.inference_mode():
            sums.append(engine.losses(batch, row, family, direction, 0.01))
        told.append(family.__dict__["seen"])

    for block in (1, 2, 7, 100):
        with monkeypatch.context() as patch:
            patch.setattr(Blocks, "_fitting", lambda *_, block=block: block)
            ask(Engine(model, case.objective, "fold"))
    ask(Engine(model, case.objective, "sequential"))
    for budget in (100_000, 10_000_000):
        ask(Engine(model, case.objective, "fold", memory_budget=budget))
    update = Recorded(Key.root(1), dict(Engine(model, case.objective).params), 18, law)
    gradient = DirectionGradient(update, torch.zeros(18))
    monkeypatch.setattr(DirectionGradient, "_weighted", None)
    assert all(gradient[name].shape == model.get_parameter(name).shape for name in gradient)
    told.append(update.__dict__["seen"])
    assert len(told[0]) == 18 * 6
    for other in told[1:]:
        assert other == told[0]
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [1, None])
def test_a_device_draws_the_same_signs(rank: int | None) -> None:
    one, other = (dict(drawn("rademacher", rank, device)) for device in ("cpu", "cuda"))
    for name, value in one.items():
        assert torch.equal(value, other[name].cpu()), name
