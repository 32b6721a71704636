"""Weights that wait in host memory or in files: what a step costs, what is in memory at once.

    python -m benchmarks.offload [--rounds N] [--only PATTERN] [--output FILE] [--device DEVICE]

Three steps of momentum in fresh processes, in turns: resident, `offload=cpu` and `offload=FOLDER`.
`ms/step` is of the fastest of the steps after the first, of all rounds, by the clock of the
processor on a CPU, so that others on the machine do not count; `weights` all there are and
`at once` what the device has copies of at the most; `live` what tensors passes have there at their
peak, but for weights that stay; `private` the peak of the process's own memory, which is what no
file stands behind; `digest` is of all trained weights.

The last work, of two steps, has 3.2 GB of weights and may take 1.5 GiB of memory, by a limit that
the system keeps (RLIMIT_DATA). It runs from the folder alone.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Work, cross_entropy, filled, llama, works
from benchmarks.options import chosen, options
from benchmarks.results import merge
from fwdlearn.allocators import Uniform
from fwdlearn.batch import Batch
from fwdlearn.data import Data, DataInfo
from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.engine.offload import Offload
from fwdlearn.errors import MissingError
from fwdlearn.estimators import RandomPerturbation
from fwdlearn.memory import peak_bytes, private_bytes, weights_bytes
from fwdlearn.trainer import Trainer

STEPS = 3
LARGE = "Llama 3.2 GB float32, 2 x (2 x 16)"
LIMIT = 3 * 2**29


class Rows:
    """The rows of a work, as data."""

    def __init__(self, batch: Batch) -> None:
        self.rows = batch

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        return self.rows.select(index)


def everything() -> Mapping[str, Callable[[], Work]]:
    """Name -> what makes the workload."""
    names = ("blocks d=256 L=4, 8 x (4 x 64)", "MiniLM float32, 8 x (16 x 64)")
    found = {name: works()[name] for name in names}

    def add(name: str, layers: int, fill: bool) -> None:
        parts = partial(llama, layers, 2, 16, torch.float32, fill)
        found[name] = lambda: Work(name, *parts(), 2)

    add("Llama 2 layers float32, 2 x (2 x 16)", 2, True)
    # Whose weights first exist where they are to be.
    add(LARGE, 15, False)
    return found


def trainer(work: Work, offload: str | None, device: str) -> Trainer:
    model = work.model if offload is not None else work.model.to(device)
    data = Data(DataInfo("features", (), 10), Rows(work.batch))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    return Trainer(
        model,
        data,
        cross_entropy,
        RandomPerturbation(1e-3),
        Uniform(work.directions),
        optimizer,
        batch_size=work.rows,
        steps=2 if work.name == LARGE else STEPS,
        log_every=1,
        device=device,
        offload=offload,
    )


class Clock:
    """A sink that keeps when each step was over."""

    def __init__(self, device: str) -> None:
        self.now = time.process_time if device == "cpu" else time.monotonic
        self.times: list[float] = []

    def start(self, meta: dict[str, Any]) -> None:
        self.times.append(self.now())

    def log(self, record: dict[str, Any]) -> None:
        self.times.append(self.now())

    def finish(self, summary: dict[str, Any]) -> None:
        pass

    @property
    def fastest(self) -> float:
        after_first = zip(self.times[1:], self.times[2:], strict=False)
        return min(after - before for before, after in after_first)


@contextmanager
def watched(found: dict[str, int]) -> Iterator[None]:
    """Within, the peak of the process's own memory is looked for."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            found["private"] = max(found["private"], private_bytes())

    found["private"] = private_bytes()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def alone(name: str, offload: str | None, device: str) -> dict[str, Any]:
    """A run, in this process."""
    work, clock = everything()[name](), Clock(device)
    if device != "cpu":
        work = Work(work.name, work.model, work.batch.to(device), work.directions)
    run = trainer(work, offload, device)
    if name == LARGE:
        if offload is not None and device == "cpu":
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
        filled(run.model)
    run.sinks = [clock]
    found: dict[str, Any] = {}
    with watched(found):
        run.train()
    digest = hashlib.blake2b(digest_size=8)
    for value in run.model.parameters():
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    found |= {"step": clock.fastest, "digest": digest.hexdigest(), "peak": peak_bytes(device)}
    with LiveBytes(torch.device(device)) as live:
        run.estimate()
    weights = weights_bytes(run.model)
    home = run.home
    once = weights if offload is None else home.most if isinstance(home, Offload) else 0
    return found | {"live": live.peak, "weights": weights, "at once": once}


def measure(name: str, rounds: int, device: str) -> list[dict[str, Any]]:
    """Each way in turns, each time in a fresh process."""
    ways = ("resident", "cpu", "folder")
    if name == LARGE:
        ways = ("folder",)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for way in ways:
                words = [name, {"folder": folder}.get(way, way), device]
                line = [sys.executable, "-W", "ignore", "-m", "benchmarks.offload", "--alone"]
                done = subprocess.run([*line, *words], capture_output=True, text=True)
                if done.returncode:
                    raise MissingError(done.stderr.strip().splitlines()[-1])
                runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    entries = []
    for way in ways:
        entry = {"work": name, "variant": way, **runs[way][0]}
        entry["step"] = min(run["step"] for run in runs[way])
        entry["private"] = min(run["private"] for run in runs[way])
        first = entries[0] if entries else entry
        entry["of_resident"] = entry["step"] / first["step"]
        same = all(run["digest"] == first["digest"] for run in runs[way])
        entry["bits"] = ("same" if same else "DIFFERENT") if len(ways) > 1 else "alone"
        entries.append(entry)
    return entries


def table(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        sizes = "".join(
            f"{entry[key] / 2**20:10.1f}" for key in ("weights", "at once", "live", "private")
        )
        print(
            f"{entry['work']:38}{entry['variant']:10}{entry['step'] * 1e3:10.1f}"
            f"{entry['of_resident']:7.2f}{sizes}  {entry['bits']}",
            flush=True,
        )


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        _, _, name, offload, device = sys.argv
        print(json.dumps(alone(name, None if offload == "resident" else offload, device)))
        return
    asked = options("offload", rounds=3)
    heads = "".join(f"{head:>10}" for head in ("weights", "at once", "live", "private"))
    print(f"{'work':38}{'variant':10}{'ms/step':>10}{'ratio':>7}{heads}  MiB; bits")
    for name in chosen(everything(), asked.only):
        rounds = 1 if name.startswith("Llama") else asked.rounds
        try:
            entries = measure(name, rounds, asked.device)
        except MissingError as error:
            print(f"{name:38}skipped: {error}")
            continue
        table(entries)
        merge(asked.output, entries, everything(), rounds, asked.device)


if __name__ == "__main__":
    main()
