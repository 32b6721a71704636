"""What an output is worth, row by row: (prediction, target) -> a number, more is better.

Any function of that form is a metric, of strings where the model makes answers, and of class
numbers where it has classes. It needs no derivative. The same function is an objective
(`objectives.score`) and a figure of an evaluation (`metrics` in a recipe).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.objectives import NOT_COUNTED, logits

Metric = Callable[[Any, Any], float]


def exact_match(prediction: Any, target: Any) -> float:
    """1 where the two are the same, else 0; texts without case, articles and punctuation."""
    if isinstance(prediction, str):
        return float(_words(prediction) == _words(target))
    return float(prediction == target)


def f1(prediction: Any, target: Any) -> float:
    """Twice what two texts share over what they have, in words as `exact_match` sees them.

    Of sequences of classes the same, in classes; of one class it is `exact_match`.
    """
    if isinstance(prediction, int):
        return float(prediction == target)
    if isinstance(prediction, str):
        prediction, target = _words(prediction), _words(target)
    shared = (Counter(prediction) & Counter(target)).total()
    total = len(prediction) + len(target)
    return 2 * shared / total if total else 1.0


def accuracy(prediction: Any, target: Any) -> float:
    """1 where two classes are the same, else 0; of sequences the share that is."""
    if isinstance(prediction, list):
        return sum(a == b for a, b in zip(prediction, target, strict=True)) / max(len(target), 1)
    return float(prediction == target)


def scores(metric: Metric, output: Any, targets: Tensor) -> Tensor:
    """A metric of every row, float32 [rows].

    Args:
        metric: (prediction, target) -> number.
        output: what the model returned: an `Answer`, or logits [rows, classes] or [rows, steps,
            classes].
        targets: of the batch.

    Raises:
        UsageError: there is nothing to compare, or the metric fails.
    """
    found = []
    for prediction, target in pairs(output, targets):
        try:
            found.append(float(metric(prediction, target)))
        except FwdlearnError:
            raise
        except Exception as error:  # anyone's function
            name = getattr(metric, "__name__", type(metric).__name__)
            raise UsageError(
                f"the metric {name} failed on the prediction {prediction!r} and the target "
                f"{target!r}: {type(error).__name__}: {error}"
            ) from error
    return torch.tensor(found, dtype=torch.float32, device=targets.device)


def pairs(output: Any, targets: Tensor) -> list[tuple[Any, Any]]:
    """What a metric is asked about, row by row: texts, class numbers, or lists of them.

    Raises:
        UsageError: the output is no answer and has no classes.
    """
    if hasattr(output, "texts"):
        return list(zip(output.texts(), output.wanted(targets), strict=True))
    chosen = logits(output)
    if targets.dtype != torch.int64 or chosen.shape[:-1] != targets.shape:
        raise UsageError(
            "a metric needs answers, or logits with a class for each target, got "
            f"{tuple(chosen.shape)} and {targets.dtype} {tuple(targets.shape)}."
        )
    rows: Sequence[Any] = chosen.argmax(-1).tolist()
    wanted: Sequence[Any] = targets.tolist()
    if targets.dim() == 1:
        return list(zip(rows, wanted, strict=True))
    made = []
    for row, target in zip(rows, wanted, strict=True):
        kept = [(a, b) for a, b in zip(row, target, strict=True) if b != NOT_COUNTED]
        made.append(([a for a, _ in kept], [b for _, b in kept]))
    return made


def without_letter(prediction: str, target: str, letter: str = "e") -> float:
    """The share of an answer's words that do without a letter; 0 of an answer without words.

    Args:
        prediction: the answer.
        target: not looked at.
        letter: one, in either case.
    """
    words = [word for word in prediction.lower().split() if any(map(str.isalpha, word))]
    return sum(letter.lower() not in word for word in words) / max(len(words), 1)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
