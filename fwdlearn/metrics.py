"""What an evaluation says: the mean loss, and what the outputs are worth in figures of their own.

    accuracy   share of the targets that have the largest logit, where targets are classes
    f1         where targets are one class a row: of the second of two, else the mean over classes
    bits       mean of -log2 p(target), where there is a class at every step: bits per character
               or token
    perplexity exp of the mean of -log p(target), beside `bits`
    nmse       squared error over the variance of the targets, where these are numbers; 1 is what
               the mean of the evaluation targets would have

Means run over everything that is counted, so that a long sequence weighs more than a short one;
the loss is the mean over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.objectives import NOT_COUNTED, logits
from fwdlearn.scoring import scores as row_scores


class Scores:
    """Adds up batches.

    Args:
        metrics: name -> function of a row, see `fwdlearn.scoring`; the result has its mean.

    Example:
        >>> scores = Scores()
        >>> scores.add(torch.ones(2), torch.eye(2), torch.tensor([0, 0]))
        >>> scores.result()
        {'loss': 1.0, 'accuracy': 0.5, 'f1': 0.0}
    """

    def __init__(self, metrics: Mapping[str, Callable[[Any, Any], float]] | None = None) -> None:
        self.metrics = metrics or {}
        self.sums: dict[str, Any] = {}

    def add(self, losses: Tensor, output: Any, targets: Tensor) -> None:
        """Adds a batch.

        Args:
            losses: [rows].
            output: what the model returned.
            targets: of the batch, [rows, ...].
        """
        found: dict[str, Any] = {"loss": losses.double().sum(), "rows": len(losses)}
        try:
            scores = logits(output)
        except UsageError:  # an objective of somebody's own, for outputs of his own
            scores = None
        if scores is not None and _are_classes(scores, targets):
            found |= _of_classes(scores, targets)
        elif scores is not None and _are_values(scores, targets):
            found |= _of_values(scores.double(), targets.double())
        for name, metric in self.metrics.items():
            found[_own(name)] = row_scores(metric, output, targets).double().sum()
        # A figure counts where every batch has it.
        names = found if not self.sums else found.keys() & self.sums.keys()
        self.sums = {name: self.sums.get(name, 0) + found[name] for name in names}

    def result(self) -> dict[str, float]:
        """The figures of everything added."""
        sums = self.sums
        made = {"loss": float(sums["loss"]) / sums["rows"]}
        if float(sums.get("classes", 0)):
            made["accuracy"] = float(sums["right"]) / float(sums["classes"])
            if "nats" in sums:
                nats = float(sums["nats"]) / float(sums["classes"])
                made["bits"] = nats / math.log(2)
                made["perplexity"] = math.exp(min(nats, 700.0))
            if "counts" in sums:
                made["f1"] = _f1(sums["counts"])
        if "error" in sums:
            around = sums["squares"] - sums["values"].square() / sums["count"].clamp(min=1)
            if float(around.sum()) > 1e-12 * float(sums["squares"].sum()):
                made["nmse"] = float(sums["error"]) / float(around.sum())
        means = {name: float(sums[_own(name)]) / sums["rows"] for name in self.metrics}
        # Our own come first: the F1 of a class is no mean over rows.
        return means | made


def _own(name: str) -> str:
    """Where the sum of a metric stands, so that none is taken for a figure of ours."""
    return f"metric {name}"


def _are_classes(scores: Tensor, targets: Tensor) -> bool:
    return (
        targets.dtype == torch.int64
        and targets.dim() in (1, 2)
        and scores.shape[:-1] == targets.shape
    )


def _are_values(scores: Tensor, targets: Tensor) -> bool:
    return targets.is_floating_point() and targets.dim() > 1 and scores.shape == targets.shape


def _of_classes(scores: Tensor, targets: Tensor) -> dict[str, Any]:
    mask = targets != NOT_COUNTED
    right = (scores.argmax(-1) == targets) & mask
    found = {"right": right.sum(), "classes": mask.sum()}
    if targets.dim() == 2:
        pairs = (scores.flatten(0, 1), targets.flatten())
        found["nats"] = F.cross_entropy(*pairs, reduction="none").double().sum()
    elif mask.all():
        classes = scores.shape[-1]
        chosen, wanted = (F.one_hot(v, classes) for v in (scores.argmax(-1), targets))
        found["counts"] = torch.stack(((chosen & wanted).sum(0), (chosen + wanted).sum(0)))
    return found


def _f1(counts: Tensor) -> float:
    """From [right, chosen and wanted] of each class, int64 [2, classes]."""
    scores = 2 * counts[0].double() / counts[1].clamp(min=1)
    return float(scores[1] if len(scores) == 2 else scores[counts[1] > 0].mean())


def _of_values(values: Tensor, targets: Tensor) -> dict[str, Any]:
    """Sums of each number that is predicted at a step, or for a row."""
    mask = ~targets.isnan().any(-1, keepdim=True).expand(targets.shape)
    error = torch.where(mask, values - targets, 0.0).square().sum()
    known = torch.where(mask, targets, 0.0).flatten(0, -2)
    count = mask.flatten(0, -2).sum(0)
    return {
        "error": error,
        "values": known.sum(0),
        "squares": known.square().sum(0),
        "count": count,
    }
