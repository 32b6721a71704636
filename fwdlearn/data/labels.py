"""Class names to class numbers: the order comes from the training rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

from fwdlearn.errors import UsageError

Label = int | str


def class_order(labels: Sequence[Label], where: str) -> tuple[Label, ...]:
    """The distinct labels, ascending: numbers as numbers, names by letter.

    Args:
        labels: of the training rows.
        where: the file or folder, for the message.

    Raises:
        UsageError: fewer than two classes, or numbers and names together.
    """
    if len({type(label) for label in labels}) > 1:
        raise UsageError(f"{where}: some labels are numbers and some are text; use one kind.")
    order = tuple(sorted(set(labels)))
    if len(order) < 2:
        raise UsageError(
            f"{where}: every training row has the label {order[0]!r}; classification needs at "
            "least two classes. To predict a number, set regression to true."
        )
    return order


def class_numbers(
    labels: Sequence[Label], order: Sequence[Label], where: Callable[[int], str]
) -> Tensor:
    """The place of each label in `order`, int64 [rows].

    Args:
        labels: of these rows.
        order: the classes, from `class_order`.
        where: the place of row i, as `file:line`, for the message.

    Raises:
        UsageError: a label that `order` does not hold.
    """
    number = {label: i for i, label in enumerate(order)}
    for i, label in enumerate(labels):
        if label not in number:
            close = get_close_matches(str(label), [str(known) for known in order], n=1)
            nearest = f" The nearest is {close[0]!r}." if close else ""
            shown = ", ".join(repr(known) for known in order[:10])
            more = ", ..." if len(order) > 10 else ""
            raise UsageError(
                f"{where(i)}: the label {label!r} does not occur in the training rows, whose "
                f"classes are {shown}{more}.{nearest} Correct it, or add such rows to the "
                "training data."
            )
    return torch.tensor([number[label] for label in labels], dtype=torch.int64)
