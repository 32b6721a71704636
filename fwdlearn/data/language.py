"""Rows for language models, prepared by the model's tokenizer and padded only in a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.data.passages import LanguageProcessor, TokenSequences, language_processor
from fwdlearn.data.types import Dataset
from fwdlearn.errors import UsageError


@dataclass(frozen=True)
class Unread:
    """Rows that wait for a language model's tokenizer.

    Args:
        owner: the loader, as the user calls it.
        rows: how many there are.
        make: the rows, from what the model brings.
    """

    owner: str
    rows: int
    make: Callable[[LanguageProcessor], Dataset]

    def __len__(self) -> int:
        return self.rows

    def batch(self, index: Tensor) -> Batch:
        raise UsageError(
            f"the texts of {self.owner} are not tokenised yet: pass the model's processor to "
            "Data.prepared(processor) first."
        )

    def prepared(self, processor: object | None) -> Dataset:
        return self.make(language_processor(processor, self.owner))


@dataclass(frozen=True)
class SaidRows:
    """Texts, of which each row asks for some tokens; or for an answer to what comes before them.

    Args:
        texts: one a row.
        pad: the token that fills short rows.
        limit: the longest row the model reads; padding never goes beyond it.
        multiple: lengths of a batch are rounded up to a multiple of this.
        said: whether the model is asked for the tokens, each from those before it.
        new_tokens: how long an answer is that the model is to make, or None for none.
    """

    texts: TokenSequences
    pad: int
    limit: int
    multiple: int = 8
    said: bool = True
    new_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        return self.texts.lengths

    @property
    def passes(self) -> int:
        """One for the tokens that are asked for, and one for each token of an answer."""
        return int(self.said) + (self.new_tokens or 0)

    def batch(self, index: Tensor) -> Batch:
        inputs = self.texts.padded(index, self.pad, self.limit, self.multiple)
        targets = inputs.pop("said")
        if not self.said:
            inputs = {}
        if self.new_tokens is not None:
            inputs |= self.texts.before(index, self.pad)
            inputs["room"] = torch.full((len(index), self.new_tokens), self.pad)
        return Batch((), targets, inputs, self.passes)


@dataclass(frozen=True)
class WordRows:
    """Texts with a place where one of a few words belongs.

    Args:
        texts: one a row.
        place: int64 [rows], the token whose output tells the word.
        words: int64 [classes], the token of each class.
        targets: int64 [rows], class numbers.
        pad, limit, multiple: see `SaidRows`.
    """

    texts: TokenSequences
    place: Tensor
    words: Tensor
    targets: Tensor
    pad: int
    limit: int
    multiple: int = 8

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        return self.texts.lengths

    def batch(self, index: Tensor) -> Batch:
        start, lengths = self.texts.start[index], self.texts.lengths[index]
        longest = int(lengths.max()) if len(index) else 0
        width = max(longest, min(self.limit, -(-longest // self.multiple) * self.multiple))
        mask = torch.arange(width) < lengths[:, None]
        ids = torch.full(mask.shape, self.pad, dtype=torch.int64)
        ids[mask] = self.texts.tokens[(start[:, None] + torch.arange(width))[mask]].long()
        inputs = {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "places": self.place[index].unsqueeze(1),
            "choices": self.words.expand(len(index), -1),
        }
        return Batch((), self.targets[index], inputs)


@dataclass(frozen=True)
class OptionRows:
    """Rows of several texts each, of which the likeliest is the answer.

    Args:
        texts: the options of all rows, one row's after the other's.
        first: int64 [rows], the first option of each row.
        counts: int64 [rows], its options.
        targets: int64 [rows], the right one.
        mean: whether a text's score is the mean over what is asked of it, and not the sum.
        pad, limit, multiple: see `SaidRows`.
    """

    texts: TokenSequences
    first: Tensor
    counts: Tensor
    targets: Tensor
    mean: bool
    pad: int
    limit: int
    multiple: int = 8

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def passes(self) -> int:
        """Options of a row, at most: each is read."""
        return int(self.counts.max())

    @cached_property
    def lengths(self) -> Tensor:
        rows = torch.arange(len(self)).repeat_interleave(self.counts)
        empty = torch.zeros(len(self), dtype=torch.int64)
        return empty.scatter_reduce(0, rows, self.texts.lengths, "amax")

    def batch(self, index: Tensor) -> Batch:
        option = torch.arange(self.passes)
        there = option < self.counts[index, None]
        # A row with fewer shows its first one again, and is not asked for it.
        number = torch.where(there, self.first[index, None] + option, self.first[index, None])
        shown = self.texts.padded(number.flatten(), self.pad, self.limit, self.multiple)
        inputs = {name: value.unflatten(0, number.shape) for name, value in shown.items()}
        options = inputs.pop("said")
        inputs["options"] = options
        tokens = (options >= 0).sum(-1) if self.mean else torch.ones_like(number)
        inputs["divisors"] = torch.where(there, tokens, 0)
        return Batch((), self.targets[index], inputs, self.passes)
