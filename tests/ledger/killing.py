"""Runs in processes of their own that can be killed, and what they leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPE = """\
model: {model}
data: {{name: digits, test_fraction: 0.9}}
estimator: {estimator}
allocator: {allocator}
optimizer: {optimizer}
trainer: {{batch_size: 8, steps: 30, evaluate_every: 12, log_every: 7, train_mode: {train_mode}}}
seed: 3
"""
MLP = "{name: mlp, hidden: [8]}"
SHORT = '{name: "tests.ledger.parts:short"}'
UNIFORM = "{name: Uniform, directions: 2}"
SGD = "{name: SGD, lr: 0.05}"
MOMENTUM = "{name: SGD, lr: 0.02, momentum: 0.9}"
ADAM = "{name: Adam, lr: 0.01, schedule: {name: CosineAnnealingLR}}"
FRANK_WOLFE = "{name: FrankWolfe, set: {name: L1Ball, radius: 30}}"


def recipe(
    estimator: str,
    optimizer: str,
    model: str = MLP,
    allocator: str = UNIFORM,
    train_mode: bool = False,
) -> str:
    """The text of a recipe."""
    mode = str(train_mode).lower()
    return RECIPE.format(
        estimator=estimator, optimizer=optimizer, model=model, allocator=allocator, train_mode=mode
    )


RNN = """\
model: {name: recurrent, cell: gru, hidden: [6]}
data: {name: delayed_recall, steps: 12, delay: 3, evaluation_rows: 16}
objective: {name: mean_squared_error}
"""


def through_time(estimator: str, optimizer: str, every: str = "null") -> str:
    """The text of a recipe of a recurrent network, updated every few steps of its sequences."""
    rest = recipe(estimator, optimizer).split("\n", 2)[2]
    return RNN + rest.replace("batch_size: 8,", f"batch_size: 8, every: {every},")


# Coefficients alone tell the first three; the others have states, or gradients of another kind.
CASES = {
    "perturbation-adam": recipe("{name: RandomPerturbation}", ADAM),
    "spsa-momentum-bfloat16": recipe("{name: SPSA, sigma: 0.05}", MOMENTUM, SHORT),
    "slopes-sgd": recipe("{name: ForwardGradient, law: gaussian}", SGD),
    "guess-adam": recipe("{name: ForwardGradient, guess: momentum}", ADAM),
    "adaptive-momentum": recipe(
        "{name: RandomPerturbation, rank: null}",
        MOMENTUM,
        allocator="{name: AdaptiveDirections, directions: 2, signal: residual}",
    ),
    "perturbation-frank-wolfe": recipe(
        "{name: RandomPerturbation}", FRANK_WOLFE, allocator="{name: Neyman, directions: 2}"
    ),
    "activity-adam": recipe("{name: ActivityNodePerturbation}", ADAM),
    "perturbation-adam-bfloat16": recipe("{name: RandomPerturbation, sigma: 0.05}", ADAM, SHORT),
    "likelihood-ratio-momentum": recipe("{name: LikelihoodRatio, sigma: 0.1}", MOMENTUM),
    "likelihood-ratio-adam-bfloat16": recipe("{name: LikelihoodRatio, sigma: 0.2}", ADAM, SHORT),
    "causal-adam": through_time("{name: CausalNodePerturbation}", ADAM),
    "causal-every-momentum": through_time("{name: CausalNodePerturbation}", MOMENTUM, every="5"),
    "perturbation-every-sgd": through_time("{name: RandomPerturbation}", SGD, every="4"),
    "perturbation-adam-offloaded": recipe("{name: RandomPerturbation}", ADAM).replace(
        "batch_size: 8,", "batch_size: 8, offload: .,"
    ),
    "words-adam": recipe(
        "{name: RandomPerturbation}", ADAM, model='{name: "tests.ledger.parts:words"}'
    ),
    "slopes-frank-wolfe": recipe("{name: ForwardGradient}", FRANK_WOLFE),
}


def train(words: list[str], log: str, most: int | None = None) -> None:
    """In the child: the command, with snapshots as often as there is a step.

    Args:
        most: bytes that a file may have.
    """
    import torch

    from fwdlearn.cli import main
    from fwdlearn.ledger import journal

    torch.set_num_threads(1)
    journal._COSTS = 0
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if most is not None:
        # The system says so with an error, not with a signal.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    os._exit(main(["train", *words]))


def start(words: list[str], log: Path, **limits: Any) -> Any:
    """A process that runs the command as `train` does; everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fwdlearn.recipe.run", "fwdlearn.estimators", "sklearn.datasets", __name__]
    )
    process = context.Process(target=train, args=(words, str(log)), kwargs=limits)
    process.start()
    return process


def left(folder: Path) -> dict[str, Any]:
    """What must be the same however often a run was killed: times aside, everything."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({k: v for k, v in row.items() if k not in ("seconds", "queries_per_second")})
    return {
        "weights": (folder / "model" / "model.safetensors").read_bytes(),
        "ledger": (folder / "ledger.bin").read_bytes(),
        "metrics": rows,
    }


def kill_and_compare(
    text: str, folder: Path, kills: int, seed: int, signals: Sequence[int] = (signal.SIGKILL,)
) -> int:
    """Kills runs of a recipe at random moments until it has done so often enough.

    Args:
        text: the recipe.
        folder: an empty one.
        kills: how many.
        seed: of the moments.
        signals: to kill with.

    Returns:
        How many runs it took, each compared with one that was left alone.
    """
    path, log = folder / "recipe.yaml", folder / "log.txt"
    path.write_text(text)
    every = ["output.snapshot_seconds=0", "--quiet"]
    start(["--help"], log).join()  # the first one waits for the imports
    begun = time.monotonic()
    whole = start([str(path), f"output.dir={folder}/whole", *every], log)
    whole.join()
    duration = time.monotonic() - begun
    assert whole.exitcode == 0, log.read_text()
    wanted, chance = left(folder / "whole"), random.Random(seed)
    done = runs = 0
    while done < kills:
        runs += 1
        words = [str(path), f"output.dir={folder}/killed-{runs}", *every]
        while True:
            process = start(words, log)
            process.join(chance.uniform(0, duration) if done < kills else None)
            if process.is_alive():
                number = chance.choice(signals)
                os.kill(process.pid, number)
                process.join()
                done += 1
                if process.exitcode:
                    # By the system, or by us once the handlers are there.
                    assert process.exitcode in (-number, 128 + number), log.read_text()
                    continue
            assert process.exitcode == 0, log.read_text()
            break
        got = left(folder / f"killed-{runs}")
        for name, value in wanted.items():
            assert got[name] == value, f"{name} differ after kills; seed {seed}; {log.read_text()}"
    return runs
