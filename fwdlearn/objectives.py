"""Losses, one for each row: (output, targets) -> float32 [rows], or wider if the output is.

Any callable of that form is an objective. `output` is what the model returned: a tensor, or an
object with `logits`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.errors import UsageError


def logits(output: Any) -> Tensor:
    """The tensor of an output: itself, or its `logits`; float32 at least."""
    value = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(value, Tensor):
        raise UsageError(
            f"the model returned {type(output).__name__}; an objective needs a tensor, or an "
            "object whose `logits` is one."
        )
    return value.to(torch.promote_types(value.dtype, torch.float32))


def cross_entropy(output: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-probability of the target class, in nats.

    Args:
        output: logits [rows, classes].
        targets: int64 [rows].
        label_smoothing: in [0, 1].
    """
    scores = _scores(output, targets)
    return F.cross_entropy(scores, targets, reduction="none", label_smoothing=label_smoothing)


def mean_squared_error(output: Any, targets: Tensor) -> Tensor:
    """Mean over a row's values of the squared difference; output and targets [rows, ...]."""
    values = logits(output)
    if values.numel() != targets.numel():
        raise UsageError(
            f"mean_squared_error needs output and targets of one size, got {tuple(values.shape)} "
            f"and {tuple(targets.shape)}."
        )
    return (values - targets.reshape(values.shape)).square().flatten(1).mean(1)


def zero_one(output: Any, targets: Tensor) -> Tensor:
    """1 where the largest logit is not the target's, else 0. No derivative, and none needed."""
    return (_scores(output, targets).argmax(1) != targets).float()


def returned(output: Any, targets: Tensor) -> Tensor:
    """What the model returned, where that is one loss a row already."""
    return output


def per_row(losses: object, rows: int) -> Tensor:
    """What an objective returned, float32 or wider.

    Raises:
        UsageError: it is not one loss a row.
    """
    if not isinstance(losses, Tensor) or losses.shape != (rows,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UsageError(
            f"the objective must return one loss a row, [{rows}], got {shape}; "
            "a mean over rows cannot be told apart again."
        )
    return losses.to(torch.promote_types(losses.dtype, torch.float32))


def correct(output: Any, targets: Tensor) -> Tensor | None:
    """bool [rows]: whether the largest logit is the target's; None where that means nothing."""
    scores = logits(output)
    if targets.dtype != torch.int64 or targets.dim() != 1 or scores.dim() != 2:
        return None
    return scores.argmax(1) == targets


def residual(output: Any, targets: Tensor) -> Tensor:
    """float [rows]: how far outputs are from targets.

    For int64 targets [rows] the norm of softmax(logits) minus the target's unit vector, which is
    that of the derivative of cross-entropy; for floating targets that of output minus targets.

    Raises:
        UsageError: neither means anything for these outputs.
    """
    if targets.is_floating_point():
        values = logits(output)
        if values.numel() == targets.numel():
            return (values - targets.reshape(values.shape)).flatten(1).norm(dim=1)
    elif targets.dim() == 1:
        scores = logits(output)
        if scores.dim() == 2 and targets.dtype == torch.int64:
            place = targets.unsqueeze(1)
            return (
                scores.softmax(1).scatter_add(1, place, -torch.ones_like(scores[:, :1])).norm(dim=1)
            )
    raise UsageError(
        "the signal 'residual' needs logits [rows, classes] with int64 targets, or as many values "
        f"as floating targets, got {tuple(logits(output).shape)} and {targets.dtype} "
        f"{tuple(targets.shape)}; the signal 'loss' needs neither."
    )


def _scores(output: Any, targets: Tensor) -> Tensor:
    scores = logits(output)
    if scores.dim() != 2 or targets.dtype != torch.int64 or targets.dim() != 1:
        raise UsageError(
            "a classification objective needs logits [rows, classes] and int64 targets [rows], "
            f"got {tuple(scores.shape)} and {targets.dtype} {tuple(targets.shape)}."
        )
    return scores
