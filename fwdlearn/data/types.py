"""What every loader returns: rows by number, and what there is to know of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.errors import UsageError


@dataclass(frozen=True)
class DataInfo:
    """What a model must know of the data before it can be built.

    Args:
        kind: `features` (one vector a row), `image` (channels, height, width), `text`,
            `language` (texts whose targets are words, for language models), `sequence`
            (steps, features) or `tokens` (steps,) of numbers below `classes`.
        shape: shape of one row's input, without the row dimension; `()` for text.
        classes: number of classes, at least 2, or None for regression.
        labels: the name of each class in the order of the targets, where they have names.
        values: numbers to predict, for a row or for each step; read only where `classes` is None.
        per_step: whether there is a target at every step of a row and not one for the whole.
    """

    kind: Literal["features", "image", "text", "language", "sequence", "tokens"]
    shape: tuple[int, ...]
    classes: int | None
    labels: tuple[str, ...] | None = None
    values: int = 1
    per_step: bool = False

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for a row or step: one a class, or the values to predict."""
        return self.values if self.classes is None else self.classes


class Dataset(Protocol):
    """Rows by number.

    One with an attribute `endless` that is true makes rows of their numbers: a run then goes from
    each number to the next and sees none twice, where others are gone through in a shuffled order.
    One of which a row counts more than one query has an attribute `passes`, that of its batches;
    one of rows of different lengths has `lengths`, int64 [rows].
    """

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Batch:
        """The rows `index` (int64 [rows]), in that order; rows may repeat."""
        ...


def passes(dataset: Dataset) -> int:
    """Queries that one call of the model counts for a row; see `Batch`."""
    return int(getattr(dataset, "passes", 1))


@runtime_checkable
class Preparable(Protocol):
    """A dataset whose rows depend on the model that reads them: text, and images to be resized."""

    def prepared(self, processor: object | None) -> Dataset: ...


@dataclass(frozen=True)
class Data:
    """Training rows, evaluation rows where there are any, and their description."""

    info: DataInfo
    train: Dataset
    evaluation: Dataset | None = None

    def prepared(self, processor: object | None) -> Data:
        """The same rows in the form that a model reads.

        Args:
            processor: a tokenizer for text, a callable from images (float32 [rows, channels,
                height, width], values 0 to 1) to keyword inputs for images, or None where the
                model reads the rows as they are.

        Raises:
            UsageError: text without a tokenizer.
        """

        def prepare(dataset: Dataset) -> Dataset:
            return dataset.prepared(processor) if isinstance(dataset, Preparable) else dataset

        evaluation = None if self.evaluation is None else prepare(self.evaluation)
        return replace(self, train=prepare(self.train), evaluation=evaluation)


@dataclass(frozen=True)
class Rows:
    """Features or images held in memory.

    Args:
        inputs: [rows, ...] float32, or uint8 standing for multiples of 1/255: bytes are a quarter
            of the memory and become floats only in a batch.
        targets: int64 [rows] class numbers, or float32 [rows, values].
        transform: what a model wants done to the images of a batch (see `Data.prepared`).
    """

    inputs: Tensor
    targets: Tensor
    transform: Callable[[Tensor], Mapping[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Tensor) -> Batch:
        inputs = self.inputs.index_select(0, index)
        if inputs.dtype == torch.uint8:
            inputs = inputs.to(torch.float32) / 255
        targets = self.targets.index_select(0, index)
        if self.transform is None:
            return Batch((inputs,), targets)
        return Batch((), targets, self.transform(inputs))

    def prepared(self, processor: object | None) -> Rows:
        if processor is None or self.inputs.ndim != 4:
            return self
        if not callable(processor):
            raise UsageError(
                f"{type(processor).__name__} cannot prepare images: a callable from images to "
                "keyword inputs is needed."
            )
        return replace(self, transform=processor)


@dataclass(frozen=True)
class TextRows:
    """Texts that wait for the model's tokenizer.

    Args:
        texts: one text a row.
        pairs: the second text of each row, or None.
        targets: int64 [rows] class numbers, or float32 [rows, 1].
        path: the file they come from, and `lines` the line of each row, for error messages.
        max_length: tokens of a row, at most; None takes the tokenizer's own limit.
        pad_to_multiple: a batch's length is rounded up to a multiple of this.
    """

    texts: Sequence[str]
    pairs: Sequence[str] | None
    targets: Tensor
    path: str
    lines: Sequence[int]
    max_length: int | None = None
    pad_to_multiple: int = 8

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Tensor) -> Batch:
        raise UsageError(
            f"the texts of {self.path} are not tokenised yet: pass the model's tokenizer to "
            "Data.prepared(processor) first."
        )

    def prepared(self, processor: object | None) -> TokenRows:
        if not callable(processor):
            raise UsageError(
                f"the texts of {self.path} need a tokenizer, and this model brings none; "
                "models.transformers brings the one in the model's folder."
            )
        return self._tokenised(processor)

    def _tokenised(self, tokenizer: Any) -> TokenRows:
        own_limit = int(getattr(tokenizer, "model_max_length", 512))
        limit = min(own_limit, self.max_length or own_limit)
        second = () if self.pairs is None else (list(self.pairs),)
        encoded = tokenizer(
            list(self.texts), *second, truncation=True, max_length=limit, padding=False
        )
        rows = encoded["input_ids"]
        for line, row in zip(self.lines, rows, strict=True):
            if not row:
                raise UsageError(
                    f"{self.path}:{line}: the text has no tokens; a row needs at least one. "
                    "Remove the line or give it a text."
                )
        lengths = torch.tensor([len(row) for row in rows])
        padding = {"input_ids": tokenizer.pad_token_id or 0}
        if "token_type_ids" in encoded:
            padding["token_type_ids"] = getattr(tokenizer, "pad_token_type_id", 0)
        flat = {
            name: torch.tensor([token for row in encoded[name] for token in row], dtype=torch.int32)
            for name in padding
        }
        start = torch.cumsum(lengths, 0) - lengths
        return TokenRows(flat, padding, start, lengths, self.targets, limit, self.pad_to_multiple)


@dataclass(frozen=True)
class TokenRows:
    """Tokenised texts, end to end in one tensor for each keyword; padded only in a batch.

    Args:
        flat: int32 [tokens of all rows] for each keyword.
        padding: the value that fills a short row, for each keyword.
        start: int64 [rows] where each row begins in `flat`, and `lengths` its tokens.
        targets: int64 [rows] class numbers, or float32 [rows, 1].
        limit: the longest row the model reads; padding never goes beyond it.
        pad_to_multiple: a batch's length is rounded up to a multiple of this.
    """

    flat: Mapping[str, Tensor]
    padding: Mapping[str, int]
    start: Tensor
    lengths: Tensor
    targets: Tensor
    limit: int
    pad_to_multiple: int = 8

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Tensor) -> Batch:
        start, lengths = self.start[index], self.lengths[index]
        longest = int(lengths.max()) if len(index) else 0
        multiple = self.pad_to_multiple
        width = max(longest, min(self.limit, -(-longest // multiple) * multiple))
        place = torch.arange(width)
        mask = place < lengths[:, None]
        source = (start[:, None] + place)[mask]
        kwargs = {}
        for name, flat in self.flat.items():
            tokens = torch.full(mask.shape, self.padding[name], dtype=torch.int64)
            tokens[mask] = flat[source].to(torch.int64)
            kwargs[name] = tokens
        kwargs["attention_mask"] = mask.to(torch.int64)
        return Batch((), self.targets.index_select(0, index), kwargs)
