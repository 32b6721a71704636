"""A small run in this process, with a ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwdlearn.allocators import Uniform
from fwdlearn.baselines import BaselineTrainer, is_baseline
from fwdlearn.estimators import RandomPerturbation
from fwdlearn.ledger import journal
from fwdlearn.models import mlp
from fwdlearn.objectives import cross_entropy
from fwdlearn.sinks.jsonl import JsonLines
from fwdlearn.trainer import Trainer
from tests.test_trainer import tiny


class Run:
    """One that goes on with what is in its folder.

    Args:
        folder: of the run.
        steps: to take.
        seconds: between snapshots.
        parts: of the trainer, where they are not the usual ones.
    """

    def __init__(self, folder: Path, steps: int = 6, seconds: float = 0.0, **parts: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.said, self.warned = folder, [], []
        data = tiny()
        model = parts.pop("model", None) or mlp(data.info, hidden=(4,)).module
        optimizer = parts.pop("optimizer", lambda p: torch.optim.Adam(p, lr=0.01))(
            [p for p in model.parameters() if p.requires_grad]
        )
        metrics = JsonLines(folder / "metrics.jsonl")
        self.journal = journal.RunJournal(
            folder, {"steps": steps}, metrics, self.said.append, self.warned.append, seconds
        )
        estimator = parts.pop("estimator", RandomPerturbation(1e-2))
        self.trainer = (BaselineTrainer if is_baseline(estimator) else Trainer)(
            model,
            data,
            cross_entropy,
            estimator,
            parts.pop("allocator", Uniform(2)),
            optimizer,
            batch_size=8,
            steps=steps,
            log_every=2,
            sinks=[metrics],
            journal=self.journal,
            **parts,
        )

    def train(self) -> Mapping[str, Tensor]:
        """To the end; the weights then."""
        try:
            self.trainer.train()
        finally:
            self.journal.close()
        return {n: p.detach().clone() for n, p in self.trainer.model.named_parameters()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """In every bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
