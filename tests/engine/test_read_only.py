"""Weights in memory that must not be written: losses and estimates need no more than to read."""

from __future__ import annotations

import mmap
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocators import Uniform
from fwdlearn.data import Data, DataInfo, Rows
from fwdlearn.engine import Engine
from fwdlearn.engine.params import read_only
from fwdlearn.errors import UsageError
from fwdlearn.estimators import SPSA, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.oracle import ModelOracle
from fwdlearn.trainer import Trainer

from .models import CASES, built, cross_entropy

ROOT = Path(__file__).parents[2]
NAMES = ("mlp", "cnn", "tied", "multihead_attention", "odd")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs to know what is writable")


def mapped(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers in a file that is mapped for reading alone."""
    own = list(dict.fromkeys([*model.parameters(), *model.buffers()]))
    with tempfile.TemporaryFile() as file:
        for value in own:
            file.write(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
            # As aligned as torch's own memory, on which the order of sums depends.
            file.write(bytes(-file.tell() % 64))
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    start = 0
    for value in own:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=start)
        value.data = seen.view(value.shape)
        start += -(-value.numel() * value.element_size() // 64) * 64
    return model


def answers(model: nn.Module, name: str, rung: str) -> list[Tensor]:
    """Losses and an estimate's gradients."""
    case = CASES[name]
    engine = Engine(model, case.objective, rung=rung)
    oracle = ModelOracle(engine, case.batch(6).to("cpu", torch.float32))
    found = []
    for estimator in (SPSA(), RandomPerturbation(sigma=0.01, rank=None)):
        plan, _ = Uniform(2).allocate(6, {}, None, key=Key.root(2))
        estimate, _ = estimator.estimate(oracle, oracle.params, None, key=Key.root(1), plan=plan)
        found += [estimate.loss, *(estimate.grad[key].clone() for key in estimate.grad)]
    assert engine.choice is not None and engine.choice.rung == rung, engine.choice
    return found


def compare() -> None:
    for name in NAMES:
        for rung in ("fold", "sequential"):
            plain = answers(built(name, torch.float32), name, rung)
            fixed = mapped(built(name, torch.float32))
            assert len(read_only(dict(fixed.named_parameters()))) == len([*fixed.parameters()])
            for one, other in zip(plain, answers(fixed, name, rung), strict=True):
                assert torch.equal(one, other), (name, rung)


def write() -> None:
    next(mapped(built("mlp", torch.float32)).parameters()).data.add_(0)


def run(function: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because a write ends it."""
    command = f"from tests.engine import test_read_only as t; t.{function}(); print('done')"
    return subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_losses_and_estimates_read_and_never_write() -> None:
    """Bit for bit those of weights in ordinary memory, for every kind of use of a parameter."""
    ended = run("compare")
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def test_a_write_there_ends_the_process() -> None:
    ended = run("write")
    assert ended.returncode < 0 and "done" not in ended.stdout


def test_training_what_cannot_be_written_is_refused() -> None:
    x = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    data = Data(DataInfo("features", (10,), 5), Rows(x, torch.arange(12) % 5))
    model = mapped(built("mlp", torch.float32))

    def trainer() -> Trainer:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        return Trainer(
            model, data, cross_entropy, SPSA(), Uniform(2), optimizer, batch_size=6, steps=2
        )

    with pytest.raises(UsageError, match="0.bias lies in memory that cannot be written, mapped"):
        trainer()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    model[3] = nn.Linear(16, 5)
    assert trainer().train()["status"] == "finished"
