"""Texts as tokens of which some are asked for: those that a language model has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.objectives import NOT_COUNTED


@dataclass(frozen=True)
class LanguageProcessor:
    """What makes rows for a language model.

    Args:
        tokenizer: a fast one of transformers.
        masked: whether the model fills in masks and does not go on with texts.
    """

    tokenizer: Any
    masked: bool = False

    def limit(self, max_length: int | None) -> int:
        """Tokens of a row, at most."""
        own = int(self.tokenizer.model_max_length)
        return min(own, max_length or own)


def language_processor(processor: object | None, owner: str) -> LanguageProcessor:
    """The processor; raises UsageError, naming the loader, where the model is no language model."""
    if not isinstance(processor, LanguageProcessor):
        raise UsageError(
            f"{owner} asks for words, and this model does not say any; choose the model "
            "transformers with head=causal, or head=masked where words fill a gap."
        )
    if not getattr(processor.tokenizer, "is_fast", False):
        raise UsageError(
            f"{owner} must know which letters a token stands for, and this tokenizer cannot tell; "
            "put the tokenizer.json of a fast one beside the model."
        )
    return processor


@dataclass(frozen=True)
class Passage:
    """A text, and the parts of it that a model has to say.

    Args:
        text: the whole of it.
        spans: begin and end of each part, in characters; None for all of it.
        where: as `file:line`.
        ends: whether the model has to say that the text is over.
    """

    text: str
    spans: Sequence[tuple[int, int]] | None
    where: str
    ends: bool = False


@dataclass(frozen=True)
class TokenSequences:
    """Tokens of many texts, end to end.

    Args:
        tokens: int32 [all tokens].
        asked: bool [all tokens], those that a model has to say; never the first of a text.
        start: int64 [texts], and `lengths` the tokens of each.
    """

    tokens: Tensor
    asked: Tensor
    start: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, texts: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> TokenSequences:
        """From tokens, and whether each is asked for."""
        lengths = torch.tensor([len(tokens) for tokens, _ in texts], dtype=torch.int64)
        tokens = torch.tensor([t for tokens, _ in texts for t in tokens], dtype=torch.int32)
        asked = torch.tensor([bool(a) for _, flags in texts for a in flags], dtype=torch.bool)
        start = lengths.cumsum(0) - lengths
        asked[start] = False  # nothing comes before the first that could tell it
        return cls(tokens, asked, start, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, index: Tensor, pad: int, limit: int, multiple: int) -> dict[str, Tensor]:
        """Some texts, side by side.

        Returns:
            `input_ids` and `attention_mask` [texts, tokens]; `places` [texts, asked], after which
            token each one asked for comes; and `said` [texts, asked], what it is, or -100 where a
            text asks for fewer.
        """
        # The last token of a text need not be read.
        start, lengths = self.start[index], (self.lengths[index] - 1).clamp(min=1)
        grid, mask = _grid(lengths, limit, multiple)
        source = (start[:, None] + grid)[mask]
        ids = torch.full(mask.shape, pad, dtype=torch.int64)
        following, asked = ids.clone(), torch.zeros(mask.shape, dtype=torch.bool)
        ids[mask] = self.tokens[source].to(torch.int64)
        following[mask] = self.tokens[source + 1].to(torch.int64)
        asked[mask] = self.asked[source + 1]
        kept = _grid(asked.sum(1), limit, multiple)[1]
        order = asked.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        first = order[:, : kept.shape[1]]
        return {
            "input_ids": ids,
            "attention_mask": mask.to(torch.int64),
            "places": torch.where(kept, first, 0),
            "said": torch.where(kept, following.gather(1, first), NOT_COUNTED),
        }

    def before(self, index: Tensor, pad: int) -> dict[str, Tensor]:
        """What comes before the first token asked for, padded on the left.

        Returns:
            `prompt_ids` and `prompt_mask` [texts, tokens].
        """
        rows = []
        for text in index.tolist():
            begin, length = int(self.start[text]), int(self.lengths[text])
            asked = self.asked[begin : begin + length].nonzero()
            rows.append(self.tokens[begin : begin + (int(asked[0]) if len(asked) else length)])
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row.to(torch.int64), 1
        return {"prompt_ids": ids, "prompt_mask": mask}


def _grid(lengths: Tensor, limit: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Places up to the longest, rounded up; and bool [texts, places], those that a text has."""
    longest = max(int(lengths.max()) if len(lengths) else 0, 1)
    width = max(longest, min(limit, -(-longest // multiple) * multiple))
    place = torch.arange(width)
    return place, place < lengths[:, None]


def tokenised(
    passages: Sequence[Passage],
    tokenizer: Any,
    limit: int,
    special: bool = True,
    cut: str = "start",
) -> TokenSequences:
    """Tokenises texts and marks what is asked for.

    A token that lies across the border of a part belongs to the part.

    Args:
        passages: the texts.
        tokenizer: a fast one of transformers.
        limit: tokens of a text, at most.
        special: whether the tokenizer adds the tokens that it begins texts with.
        cut: which end of a longer text goes. At the start a special token stays.

    Raises:
        UsageError: nothing of a text is asked for, or what is asked for is too long.
    """
    encoded = tokenizer(
        [passage.text for passage in passages],
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    columns = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
    texts = []
    for passage, tokens, offsets, specials in zip(passages, *columns, strict=True):
        asked = [
            not added and _inside(span, passage.spans)
            for span, added in zip(offsets, specials, strict=True)
        ]
        tokens = list(tokens)
        end = tokenizer.eos_token_id
        if passage.ends and end is not None:
            if tokens and tokens[-1] == end:
                asked[-1] = True
            else:
                tokens.append(end)
                asked.append(True)
        first = bool(specials) and bool(specials[0]) and cut == "start"
        texts.append(_cut(tokens, asked, limit, cut, first))
        if not any(texts[-1][1][1:]) and passage.spans != ():
            raise UsageError(
                f"{passage.where}: no token is asked for here. The part that the model has to "
                f"say is empty, or nothing comes before it, or max_length={limit} cut it off."
            )
    return TokenSequences.of(texts)


def _inside(span: tuple[int, int], parts: Sequence[tuple[int, int]] | None) -> bool:
    if parts is None:
        return True
    begin, end = span
    # Some tokenizers leave the blank out of a token's letters, and nothing of a blank alone.
    if begin == end:
        return any(left < end <= right for left, right in parts)
    return any(begin < right and end > left for left, right in parts)


def _cut(
    tokens: list[int], asked: list[bool], limit: int, cut: str, first: bool
) -> tuple[list[int], list[bool]]:
    if len(tokens) <= limit:
        return tokens, asked
    if cut == "end":
        return tokens[:limit], asked[:limit]
    kept = limit - int(first)
    return (
        tokens[: int(first)] + tokens[len(tokens) - kept :],
        asked[: int(first)] + asked[len(asked) - kept :],
    )
