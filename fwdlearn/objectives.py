"""Losses, one for each row: (output, targets) -> float32 [rows], or wider if the output is.

Any callable of that form is an objective. `output` is what the model returned: a tensor, or an
object with `logits`.

Of a sequence with a target at every step the loss is the mean over the steps that count, which are
those without a target of nan (of numbers) or -100 (of classes). Any objective has that form:
`at_step` is its share at one step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.errors import UsageError

NOT_COUNTED = -100
"""The class of a step that does not count, as torch has it."""


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
        output: logits [rows, classes], or [rows, steps, classes].
        targets: int64 [rows], or [rows, steps].
        label_smoothing: in [0, 1].
    """
    scores = _scores(output, targets)
    if targets.dim() == 1:
        return F.cross_entropy(scores, targets, reduction="none", label_smoothing=label_smoothing)
    losses = F.cross_entropy(
        scores.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return (losses.view(targets.shape) * step_weights(targets).to(losses.dtype)).sum(1)


def mean_squared_error(output: Any, targets: Tensor) -> Tensor:
    """Mean over a row's values of the squared difference; output and targets [rows, ...].

    Sequences are [rows, steps, values].
    """
    values = logits(output)
    if values.numel() != targets.numel():
        raise UsageError(
            f"mean_squared_error needs output and targets of one size, got {tuple(values.shape)} "
            f"and {tuple(targets.shape)}."
        )
    wanted = targets.reshape(values.shape)
    if not per_step(targets):
        return (values - wanted).square().flatten(1).mean(1)
    weights = step_weights(wanted).to(values.dtype)
    squares = torch.where(wanted.isnan(), 0.0, values - wanted).square()
    return (squares.flatten(2).mean(2) * weights).sum(1)


def zero_one(output: Any, targets: Tensor) -> Tensor:
    """1 where the largest logit is not the target's, else 0. No derivative, and none needed."""
    wrong = (_scores(output, targets).argmax(-1) != targets).float()
    return wrong if targets.dim() == 1 else (wrong * step_weights(targets).to(wrong.dtype)).sum(1)


def class_f1(output: Any, targets: Tensor, level: float, positive: int = 1) -> Tensor:
    """What a row adds to the F1 score of a class, which is no mean over rows.

    F1 is 2 t / (p + q), of the rows that are rightly found (t), found (p) and of the class (q).
    A row's loss is level (p + q) - 2 t, each 0 or 1 for one row. Its mean is below 0 where the
    F1 of the rows is above `level`, and at the best level minimising it maximises F1 (Dinkelbach
    1967, doi:10.1287/mnsc.13.7.492; Parambath, Usunier and Grandvalet 2014, arXiv:1505.00199).
    No derivative, and none needed.

    Args:
        output: logits [rows, classes].
        targets: int64 [rows].
        level: the F1 that is within reach, above 0 and at most 1.
        positive: the class that is to be found.
    """
    if not 0 < level <= 1:
        raise UsageError(f"class_f1(level=...) must be above 0 and at most 1, got {level!r}.")
    found = _scores(output, targets).argmax(-1) == positive
    wanted = targets == positive
    return level * (found.float() + wanted.float()) - 2 * (found & wanted).float()


def score(output: Any, targets: Tensor, metric: Callable[[Any, Any], float]) -> Tensor:
    """Minus a metric of each row; see `fwdlearn.scoring`. No derivative, and none needed.

    Args:
        output: an answer that the model has made, or logits of classes.
        targets: of the batch.
        metric: (prediction, target) -> number, more is better; in a recipe its name, or any
            `module:function` of two texts.
    """
    from fwdlearn.scoring import scores

    return -scores(metric, output, targets)


def returned(output: Any, targets: Tensor) -> Tensor:
    """What the model returned, where that is one loss a row already."""
    return output


def per_step(targets: Tensor) -> bool:
    """Whether each step has a target: numbers [rows, steps, ...], or classes [rows, steps]."""
    return targets.dim() > (2 if targets.is_floating_point() else 1)


def counted(targets: Tensor) -> Tensor:
    """bool [rows, steps]: which steps count, of targets at every step."""
    if targets.is_floating_point():
        return ~targets.flatten(2).isnan().any(2)
    return targets != NOT_COUNTED


def step_weights(targets: Tensor) -> Tensor:
    """float64 [rows, steps]: 1 over the number of a row's steps that count, where one does.

    A row of which no step counts has weights and loss 0.
    """
    counts = counted(targets)
    return counts.double() / counts.sum(1, keepdim=True).clamp(min=1)


def at_step(objective: Any, output: Any, targets: Tensor, weights: Tensor) -> Tensor:
    """What one step adds to the losses of rows, [rows].

    Args:
        objective: (output, targets) -> losses [rows], of a step as of a row that is no sequence.
        output: of the step.
        targets: of the step, numbers [rows, ...] or classes [rows].
        weights: [rows], the step's column of `step_weights`.
    """
    counts = weights > 0
    if targets.is_floating_point():
        kept = counts.view(-1, *[1] * (targets.dim() - 1))
        targets = torch.where(kept, targets, 0.0)
    else:
        targets = torch.where(counts, targets, 0)
    losses = per_row(objective(output, targets), len(weights))
    return losses * weights.to(losses.dtype)


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


def by_formula(objective: Any, output: Any, targets: Tensor) -> Tensor | None:
    """Derivatives of the losses of rows by their own logits, or None where no formula is known.

    Args:
        objective: as in a recipe, with its settings.
        output: logits [rows, classes] or [rows, steps, classes], or an object that has them.
        targets: as the objective takes them.
    """
    settings = objective.keywords if isinstance(objective, partial) else {}
    if getattr(objective, "func", objective) is not cross_entropy:
        return None
    scores = _scores(output, targets)
    smoothing = settings.get("label_smoothing", 0.0)
    wanted = torch.full_like(scores, smoothing / scores.shape[-1])
    place = targets.clamp(min=0).unsqueeze(-1)
    wanted.scatter_add_(-1, place, torch.full_like(scores[..., :1], 1 - smoothing))
    slopes = scores.softmax(-1).sub_(wanted)
    if targets.dim() == 1:
        return slopes * (targets != NOT_COUNTED).unsqueeze(1)
    return slopes * step_weights(targets).to(slopes.dtype).unsqueeze(-1)


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
    fits = scores.dim() in (2, 3) and targets.dim() == scores.dim() - 1
    if not fits or targets.dtype != torch.int64:
        raise UsageError(
            "a classification objective needs logits [rows, classes] and int64 targets [rows], or "
            f"[rows, steps, classes] and [rows, steps], got {tuple(scores.shape)} and "
            f"{targets.dtype} {tuple(targets.shape)}."
        )
    return scores
