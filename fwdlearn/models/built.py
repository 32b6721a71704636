"""What a model factory returns, and how it draws its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fwdlearn.arithmetic import alike


@dataclass(frozen=True)
class Built:
    """A model and what goes with it.

    Args:
        module: called as `module(*batch.args, **batch.kwargs)`; in evaluation mode.
        processor: what `Data.prepared` needs to make rows this model reads, or None.
        save: writes the model into a folder in its own format, or None where the weights and the
            factory's arguments say everything.
        prefix: frozen, and run once a row: its results, a mapping of tensors, are the keyword
            inputs of `module`. A method `calibrate(**inputs)` of it is first shown some training
            rows. None where the module reads the rows themselves.
        cache: a folder for the prefix's results, or None for memory.
    """

    module: nn.Module
    processor: object | None = None
    save: Callable[[Path], None] | None = None
    prefix: nn.Module | None = None
    cache: str | None = None


@contextmanager
def weights_from(seed: int) -> Iterator[None]:
    """Within the block torch's CPU generator starts from `seed`; afterwards it is as before.

    `torch.manual_seed` would also reseed the accelerators, whose state nobody restores.
    """
    with torch.random.fork_rng(devices=[]), alike():
        torch.default_generator.manual_seed(seed)
        yield
