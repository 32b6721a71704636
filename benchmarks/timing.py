"""Interleaved timing: every variant once a round, medians over the rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from fwdlearn.memory import keep_freed_pages


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int = 7, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each variant. One round goes before, unmeasured."""
    if device == "cpu":
        # As a trainer does; plain inference gains too.
        keep_freed_pages()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            _settle(device)
            started = time.perf_counter()
            variant()
            _settle(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
