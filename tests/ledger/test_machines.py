"""A run that is replayed on other processors, as far as one can be made to look like others."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fwdlearn import arithmetic
from fwdlearn.arithmetic import Alike
from fwdlearn.cli import main
from fwdlearn.recipe.replay import replay
from tests.ledger.killing import ADAM, FRANK_WOLFE, MOMENTUM, SGD, SHORT, recipe

# Sums and steps of these round alike wherever they run.
SURE = {
    "momentum": ("{name: RandomPerturbation}", MOMENTUM),
    "decay": ("{name: SPSA}", "{name: SGD, lr: 0.05, momentum: 0.9, weight_decay: 0.1}"),
    "adamax": ("{name: RandomPerturbation, rank: 3}", "{name: Adamax, lr: 0.01}"),
    "frank-wolfe": ("{name: RandomPerturbation, rank: null}", FRANK_WOLFE),
    "slopes": ("{name: ForwardGradient}", SGD),
    "sizes": ("{name: RandomPerturbation, scales: {'*weight': 0.7, '*': 0.3}}", SGD),
    "bfloat16": ("{name: SPSA, sigma: 0.05}", MOMENTUM),
}
# These take roots, or add numbers that are no signs.
ROOTS = {
    "adam": ("{name: RandomPerturbation}", ADAM),
    "nadam": ("{name: RandomPerturbation}", "{name: NAdam, lr: 0.01}"),
    "rmsprop": ("{name: SPSA}", "{name: RMSprop, lr: 0.01}"),
    "adagrad": ("{name: RandomPerturbation}", "{name: Adagrad, lr: 0.01}"),
    "gaussian": ("{name: RandomPerturbation, law: gaussian}", SGD),
    "adam-bfloat16": ("{name: RandomPerturbation, sigma: 0.05}", ADAM),
}


def weights(run: Path) -> Any:
    """From the first ones and the ledger alone."""
    again = replay(run, snapshot=False)
    assert not again.made
    return {n: p.tolist() for n, p in again.assembly.trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (estimator, optimizer) in {**SURE, **ROOTS}.items():
        model = {"model": SHORT} if "bfloat16" in name else {}
        (folder / f"{name}.yaml").write_text(recipe(estimator, optimizer, **model))
        words = [f"output.dir={folder / name}", "trainer.divergence=null", "--quiet"]
        assert main(["train", str(folder / f"{name}.yaml"), *words]) == 0
    return folder


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="settings for x86")
@pytest.mark.parametrize(
    ("setting", "sure"),
    [
        # Of torch's kernels, and of MKL's, which look at the processor themselves.
        ("ATEN_CPU_CAPABILITY=default", [*SURE, *ROOTS]),
        ("MKL_ENABLE_INSTRUCTIONS=AVX2", [*SURE, "adam-bfloat16"]),
        # Each starts a process.
        pytest.param("ATEN_CPU_CAPABILITY=avx2", [*SURE, *ROOTS], marks=pytest.mark.slow),
        pytest.param(
            "MKL_ENABLE_INSTRUCTIONS=SSE4_2", [*SURE, "adam-bfloat16"], marks=pytest.mark.slow
        ),
        pytest.param("OMP_NUM_THREADS=3", [*SURE, *ROOTS], marks=pytest.mark.slow),
    ],
)
def test_the_weights_are_the_same_in_every_bit(runs: Path, setting: str, sure: list[str]) -> None:
    name, value = setting.split("=")
    code = (
        "import json, sys; from pathlib import Path;"
        "from tests.ledger.test_machines import weights;"
        "print(json.dumps([weights(Path(run)) for run in sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(runs / run) for run in sure)],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for run, found in zip(sure, json.loads(done.stdout), strict=True):
        assert found == weights(runs / run), run


@pytest.mark.skipif(arithmetic._old(), reason="there is nothing to compare with")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_where_there_would_be_two(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    chance = torch.Generator().manual_seed(0)
    one, two, three = (torch.rand(10_007, generator=chance).add_(0.1).to(dtype) for _ in range(3))

    def results() -> list[torch.Tensor]:
        chance.manual_seed(1)
        made = [
            one.addcmul(two, three, value=0.3),
            one.lerp(two, 0.1),
            one.clone().lerp_(two, 0.9),
            torch.empty(777, dtype=dtype).uniform_(-0.3, 0.3, generator=chance),
        ]
        return [*made, one.clone().add_(two, alpha=-0.123)] if dtype == torch.float32 else made

    wanted = results()
    monkeypatch.setattr(arithmetic, "_old", lambda: True)
    with Alike():
        for found, value in zip(results(), wanted, strict=True):
            assert torch.equal(found, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_in_short_floats_do_not_depend_on_who_takes_them(dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(0)
    one, two = (torch.rand(10_007, generator=chance).to(dtype) for _ in range(2))

    def apart() -> torch.Tensor:
        return torch.cat(
            [a.add(b, alpha=-0.123) for a, b in zip(one.split(7), two.split(7), strict=True)]
        )

    # What torch does, which is why; if this fails there is less to do.
    assert not torch.equal(one.add(two, alpha=-0.123), apart())
    with Alike():
        assert torch.equal(one.add(two, alpha=-0.123), apart())
        wanted = (one.double() - 0.123 * two.double()).to(dtype)
        assert (one.add(two, alpha=-0.123) != wanted).float().mean() < 1e-3


def test_another_machine_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert replay(runs / "adam").moved == f"capability was {other} and is another"
