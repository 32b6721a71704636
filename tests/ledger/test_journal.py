"""A run goes on where it was: from snapshots, from records, whatever the storage did."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fwdlearn.allocators import AdaptiveDirections
from fwdlearn.baselines import RidgeReadout
from fwdlearn.errors import FwdlearnError, StorageError, UsageError
from fwdlearn.estimators import (
    AIMZO,
    LOZO,
    ActivityNodePerturbation,
    ForwardGradient,
    HiZOO,
    LikelihoodRatio,
    RandomPerturbation,
)
from fwdlearn.ledger import files, journal
from fwdlearn.ledger.records import Ledger
from fwdlearn.models import mlp
from fwdlearn.optim import NormalizedSGD, Several
from fwdlearn.trainer import Trainer
from tests.ledger.small import Run, equal
from tests.test_trainer import tiny


class Stopped(Exception):
    """The run is to end here."""


@pytest.fixture(autouse=True)
def as_often_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_COSTS", 0)


def _stop_at(run: Run, step: int) -> None:
    stepped = run.journal.stepped

    def stop(at: Any) -> None:
        if at.step == step:
            raise Stopped
        stepped(at)

    run.journal.stepped = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        run.train()


def _muon(params: Sequence[nn.Parameter]) -> Several:
    """Matrices by Muon, the rest by Adam."""
    matrices = [p for p in params if p.dim() == 2]
    rest = [p for p in params if p.dim() != 2]
    return Several([torch.optim.Muon(matrices, lr=0.01), torch.optim.Adam(rest, lr=0.01)])


@pytest.mark.parametrize(
    ("parts", "alone"),
    [
        ({}, True),
        ({"estimator": RandomPerturbation(0.1, law="gaussian", rank=2, scales={"*": 0.5})}, True),
        ({"estimator": ForwardGradient(guess="momentum")}, False),
        ({"estimator": ActivityNodePerturbation()}, False),
        ({"estimator": LikelihoodRatio()}, False),
        ({"estimator": LOZO(0.01, lazy=2)}, False),
        ({"estimator": AIMZO(0.01, width=2, refresh=2)}, False),
        ({"estimator": HiZOO(0.01)}, False),
        ({"optimizer": lambda p: NormalizedSGD(p, lr=0.01, momentum=0.9)}, True),
        ({"optimizer": _muon}, True),
        ({"estimator": RidgeReadout()}, False),
        ({"allocator": AdaptiveDirections(2)}, False),
    ],
)
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_going_on_is_the_same_in_every_bit(
    tmp_path: Path, parts: Any, alone: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(tmp_path / "whole", seconds=1e9, **parts).train()
    _stop_at(Run(tmp_path / "cut", seconds=seconds, **parts), step=4)
    again, asked = Run(tmp_path / "cut", seconds=seconds, **parts), []
    estimate = Trainer._estimate

    def counted(trainer: Trainer, step: int, *states: Any) -> Any:
        asked.append(step)
        return estimate(trainer, step, *states)

    monkeypatch.setattr(Trainer, "_estimate", counted)
    assert equal(again.train(), whole)
    names = ["ledger.bin", "metrics.jsonl"]
    assert (tmp_path / "cut" / names[0]).read_bytes() == (
        tmp_path / "whole" / names[0]
    ).read_bytes()
    came = "the snapshot of step 3" if not seconds else "the first step"
    assert again.said == [
        f"goes on at step 4: from {came}, {1 if not seconds else 4} more from the ledger"
    ]
    assert not again.warned
    # The first is thrown away: it lets the engine decide as it did.
    left = [4, 5] if alone else ([3, 4, 5] if not seconds else [0, 1, 2, 3, 4, 5])
    assert asked == [0, *left]


class _Layers(nn.Module):
    """The same layers under the same names, registered in some order."""

    def __init__(self, order: Sequence[str]) -> None:
        super().__init__()
        made = {"0": nn.Linear(6, 6), "1": nn.Linear(6, 6), "2": nn.Linear(6, 4)}
        chance = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in made.values():
                for parameter in layer.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=chance) / 2)
        for name in order:
            self.add_module(name, made[name])

    def forward(self, x: Any) -> Any:
        for name in ("0", "1", "2"):
            x = torch.tanh(self.get_submodule(name)(x))
        return x


@pytest.mark.parametrize("estimator", [RandomPerturbation(1e-2), ForwardGradient(guess="momentum")])
def test_the_order_of_registration_is_nothing(tmp_path: Path, estimator: Any) -> None:
    parts = {"estimator": estimator}
    whole = Run(tmp_path / "whole", model=_Layers("012"), **parts).train()
    # From the start, from a snapshot in the middle, and from records alone.
    for name, order, seconds in (("a", "210", 0.0), ("b", "120", 0.0), ("c", "021", 1e9)):
        if name != "a":
            first = Run(tmp_path / name, seconds=seconds, model=_Layers("012"), **parts)
            _stop_at(first, step=4)
        again = Run(tmp_path / name, seconds=seconds, model=_Layers(order), **parts)
        assert equal(again.train(), whole)
        assert not again.warned
        data = [(tmp_path / n / "ledger.bin").read_bytes() for n in ("whole", name)]
        assert data[0] == data[1]


@pytest.mark.parametrize("budget", [20_000, 100_000, None])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_records_give_the_same_weights_with_blocks_of_any_size(
    tmp_path: Path, budget: int | None, optimizer: Any
) -> None:
    parts = {"optimizer": lambda params: optimizer(params, lr=0.05), "seconds": 1e9}
    Run(tmp_path / "run", **parts).train()
    wanted = Run(tmp_path / "run", **parts).train()
    again = Run(tmp_path / "run", memory_budget=budget, **parts)
    halved = Run(tmp_path / "run", **parts)
    halved.trainer.engine.room.halvings = 4
    assert equal(again.train(), wanted) and equal(halved.train(), wanted)
    assert not again.warned and not halved.warned
    sizes = [run.trainer.engine.blocks.peak for run in (again, halved)]  # type: ignore[union-attr]
    assert budget is None or sizes[0] <= budget


def test_records_with_coefficients_are_small(tmp_path: Path) -> None:
    Run(tmp_path / "run").train()
    ledger = Ledger(tmp_path / "run" / "ledger.bin")
    # Two directions of eight rows, four bytes each.
    assert ledger.end - ledger.end_of(5) == 60 + 4 * 16


def test_a_damaged_snapshot_is_passed_over(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole").train()
    _stop_at(Run(tmp_path / "cut"), step=5)
    newest = max((tmp_path / "cut" / "snapshots").iterdir())
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    run = Run(tmp_path / "cut")
    assert equal(run.train(), whole)
    assert "is damaged" in run.warned[0] and "from the snapshot of step 3" in run.said[0]


def test_a_snapshot_of_another_run_is_passed_over(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole").train()
    _stop_at(Run(tmp_path / "other", seed=1), step=4)
    _stop_at(Run(tmp_path / "cut"), step=4)
    swapped = "snapshots/snapshot-0000000003.safetensors"
    (tmp_path / "other" / swapped).replace(tmp_path / "cut" / swapped)
    run = Run(tmp_path / "cut")
    assert equal(run.train(), whole)
    assert run.warned == ["the snapshot of step 3 does not belong to this run's files"]


def test_metrics_that_were_lost_are_made_again(tmp_path: Path) -> None:
    Run(tmp_path / "whole").train()
    _stop_at(Run(tmp_path / "cut"), step=5)
    (tmp_path / "cut" / "metrics.jsonl").unlink()
    Run(tmp_path / "cut").train()
    rows = [
        len((tmp_path / n / "metrics.jsonl").read_text().splitlines()) for n in ("whole", "cut")
    ]
    assert rows == [4, 4]


def test_other_weights_or_data_are_refused(tmp_path: Path) -> None:
    _stop_at(Run(tmp_path / "run"), step=3)
    other = mlp(tiny().info, hidden=(4,), seed=1).module
    with pytest.raises(UsageError, match="first weights are not those .* differs"):
        Run(tmp_path / "run", model=other).train()


def test_a_step_that_does_not_repeat_is_written_anew(tmp_path: Path) -> None:
    _stop_at(Run(tmp_path / "run", seconds=1e9, estimator=ActivityNodePerturbation()), step=4)
    run = Run(tmp_path / "run", seconds=1e9, estimator=ActivityNodePerturbation(law="gaussian"))
    run.train()
    # Its loss tells, so the step after the first that differs.
    assert "came out otherwise than its record says" in run.warned[0]
    assert Ledger(tmp_path / "run" / "ledger.bin").steps == 6


def test_a_state_that_cannot_be_kept_is_no_reason_to_stop(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def state_dict(self) -> Any:
            return {**super().state_dict(), "odd": {1}}

    def odd(params: Any) -> Any:
        return Odd(params, lr=0.1)

    run = Run(tmp_path / "run", optimizer=odd)
    run.train()
    assert "no snapshots can be made (optimizer/odd is set" in run.warned[0]
    assert not (tmp_path / "run" / "snapshots").exists()


class _Faulty:
    """A file that fails at a write, half of which has happened."""

    def __init__(self, file: Any, faults: _Faults) -> None:
        self.file, self.faults = file, faults

    def __enter__(self) -> _Faulty:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        with self.faults.call("write", lambda: self.file.write(bytes(data)[: len(data) // 2])):
            return int(self.file.write(data))

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())


class _Faults:
    """Lets the call of a number fail, of all that change storage on the way of a save."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.count, self.name = at, 0, ""
        for name in ("fsync", "replace", "write", "ftruncate", "unlink", "mkdir"):
            self._wrap(monkeypatch, name, getattr(os, name))
        opened = Path.open

        def open_(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
            if mode != "wb":
                return opened(path, mode, *args, **more)
            with self.call("open"):
                return _Faulty(opened(path, mode, *args, **more), self)

        monkeypatch.setattr(Path, "open", open_)

    @contextmanager
    def call(self, name: str, partly: Any = None) -> Iterator[None]:
        self.count += 1
        if self.count == self.at:
            self.name = name
            if partly is not None:
                partly()
            raise OSError(28, "No space left on device")
        yield

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str, real: Any) -> None:
        def faulty(*args: Any, **more: Any) -> Any:
            def half() -> None:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])

            with self.call(name, half):
                return real(*args, **more)

        monkeypatch.setattr(os, name, faulty)


def test_every_fault_of_the_storage_leaves_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"steps": 3, "rung": "sequential"}
    # A snapshot a step, however slow the disk: the oldest is taken away.
    monkeypatch.setattr("fwdlearn.ledger.journal._COSTS", 0.0)
    whole = Run(tmp_path / "whole", **small).train()
    met, at = [], 0
    while True:
        at += 1
        folder = tmp_path / f"run-{at}"
        run = Run(folder, **small)
        with monkeypatch.context() as patch:
            faults = _Faults(patch, at)
            try:
                run.train()
            except FwdlearnError as error:
                assert isinstance(error, StorageError)
                assert "No space left on device; free some space" in str(error)
        if faults.count < at:
            break
        met.append(faults.name)
        # Whatever it was: the records are sound, and all of the run can still be had.
        if (folder / "ledger.bin").exists():
            Ledger(folder / "ledger.bin")
        again = Run(folder, **small)
        assert equal(again.train(), whole), f"fault {at}, in {faults.name}"
        assert not again.warned
        data = [(tmp_path / n / "ledger.bin").read_bytes() for n in ("whole", folder.name)]
        assert data[0] == data[1], f"fault {at}, in {faults.name}"
    assert {"fsync", "replace", "write", "open", "ftruncate", "unlink", "mkdir"} <= set(met)
    assert len(met) > 30


def test_files_are_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for at in range(1, 5):
        with monkeypatch.context() as patch:
            _Faults(patch, at)
            with pytest.raises(OSError):
                files.replace_file(path, lambda file: file.write(b"new content"))
        assert path.read_bytes() == b"old", at
        assert os.listdir(tmp_path) == ["file"], at
