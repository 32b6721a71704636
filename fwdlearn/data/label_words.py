"""Classification by words: a prompt asks, and the likeliest of a few words is the class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwdlearn.data.fresh import check_counts
from fwdlearn.data.labels import Label, class_numbers, class_order
from fwdlearn.data.language import OptionRows, Unread, WordRows
from fwdlearn.data.lines import Files, Line, objects
from fwdlearn.data.passages import LanguageProcessor, Passage, TokenSequences, tokenised
from fwdlearn.data.types import Data, DataInfo, Dataset
from fwdlearn.errors import UsageError

_SLOT = re.compile(r"\{([^{}]*)\}")


def label_words(
    path: str | Path,
    words: tuple[str, ...],
    template: str = "{text} It was {label}.",
    evaluation_path: str | Path | None = None,
    evaluation_fraction: float | None = None,
    label: str = "label",
    max_length: int | None = None,
    pad_to_multiple: int = 8,
    train_rows: int | None = None,
    evaluation_rows: int | None = None,
    split_seed: int = 0,
) -> Data:
    """Loads texts with labels, for a language model that has no head for them.

    A causal model reads the template up to `{label}`, a masked one all of it with its mask there.
    Where every word is one token a row costs one query. Where one is more, a causal model reads
    the text with each of the words, compares their mean log-probabilities, and a row costs as
    many queries as there are words.

    Args:
        path, evaluation_path, evaluation_fraction: see `fwdlearn.data.jsonl`.
        words: one for each class, in ascending order of the labels.
        template: text with `{label}` once, and keys of a line in braces.
        label: key of the label: an integer or a string.
        max_length: tokens of a row, at most; a longer one loses its beginning.
        pad_to_multiple, train_rows, evaluation_rows, split_seed: see `fwdlearn.data.jsonl`.

    Raises:
        MissingError: no such file or folder.
        UsageError: anything wrong in a file, or an argument is out of range.
    """
    counts = {"max_length": max_length, "pad_to_multiple": pad_to_multiple}
    check_counts("label_words", **{k: v for k, v in counts.items() if v is not None})
    slots = _SLOT.findall(template)
    if slots.count("label") != 1:
        raise UsageError(f"label_words(template=...) must hold {{label}} once, got {template!r}.")
    if len(set(words)) != len(words):
        raise UsageError(f"label_words(words=...) must differ from each other, got {words!r}.")
    limits = (train_rows, evaluation_rows, split_seed)
    files = Files("label_words", path, evaluation_path, evaluation_fraction, *limits)
    order: tuple[Label, ...] | None = None
    keys = sorted(set(slots) - {"label"})
    example = "{" + ", ".join(f'"{key}": "..."' for key in keys) + f', "{label}": 0}}'

    def read(file: Path) -> tuple[list[Line], Tensor]:
        nonlocal order
        lines = list(objects(file, example))
        labels = [_label(line, label) for line in lines]
        order = order or class_order(labels, str(file))
        return lines, class_numbers(labels, order, lambda row: lines[row].where)

    held, train, other = files.divided(read, lambda part: part[1])
    assert order is not None
    if len(words) != len(order):
        shown = ", ".join(map(repr, order))
        raise UsageError(
            f"label_words(words=...) needs one word for each of the classes {shown}, got {words!r}."
        )
    form = _Form(template, words, max_length, pad_to_multiple)

    def dataset(part: tuple[list[Line], Tensor], index: Tensor) -> Unread:
        lines = [part[0][i] for i in index.tolist()]

        def make(made: LanguageProcessor) -> Dataset:
            return (
                form.masked(lines, part[1][index], made)
                if made.masked
                else form.causal(lines, part[1][index], made)
            )

        return Unread("label_words", len(lines), make)

    info = DataInfo("language", (), len(order), words)
    return Data(info, dataset(held, train), None if other is None else dataset(*other))


class _Form:
    """How a line becomes a row."""

    def __init__(
        self, template: str, words: Sequence[str], max_length: int | None, multiple: int
    ) -> None:
        self.before, self.after = template.split("{label}")
        self.words, self.max_length, self.multiple = words, max_length, multiple

    def causal(self, lines: Sequence[Line], targets: Tensor, made: LanguageProcessor) -> Dataset:
        tokenizer, limit = made.tokenizer, made.limit(self.max_length)
        passages = []
        for line in lines:
            begin = _filled(self.before, line)
            # The blank before a word is a part of its first token.
            blank = begin[len(begin.rstrip(" ")) :]
            begin = begin.rstrip(" ")
            for word in self.words:
                text = begin + blank + word
                passages.append(Passage(text, ((len(begin), len(text)),), line.where))
        texts = tokenised(passages, tokenizer, limit)
        pad, count = tokenizer.pad_token_id or 0, len(self.words)
        first = torch.arange(len(lines)) * count
        said = _one_token(texts, count)
        if said is None:
            counts = torch.full((len(lines),), count)
            return OptionRows(texts, first, counts, targets, True, pad, limit, self.multiple)
        # The words differ in the last token alone, which need not be read.
        kept = TokenSequences(
            texts.tokens, texts.asked, texts.start[first], texts.lengths[first] - 1
        )
        return WordRows(kept, kept.lengths - 1, said, targets, pad, limit, self.multiple)

    def masked(self, lines: Sequence[Line], targets: Tensor, made: LanguageProcessor) -> Dataset:
        tokenizer, limit = made.tokenizer, made.limit(self.max_length)
        blank = " " if self.before.endswith(" ") else ""
        said = []
        for word in self.words:
            ids = tokenizer(blank + word, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise UsageError(
                    f"label_words(words=...): a mask stands for one token, and {word!r} is "
                    f"{len(ids)} tokens of this model, or unknown to it; choose other words."
                )
            said.append(ids[0])
        passages = []
        for line in lines:
            begin = _filled(self.before, line)
            text = begin + tokenizer.mask_token + _filled(self.after, line)
            span = ((len(begin), len(begin) + len(tokenizer.mask_token)),)
            passages.append(Passage(text, span, line.where))
        texts = _with_masks(passages, tokenizer, limit)
        mask = (texts.tokens == tokenizer.mask_token_id).nonzero().flatten()
        # The last one, should a text hold masks of its own.
        last = torch.searchsorted(mask, texts.start + texts.lengths) - 1
        place = mask[last.clamp(min=0)] - texts.start
        pad = tokenizer.pad_token_id or 0
        return WordRows(texts, place, torch.tensor(said), targets, pad, limit, self.multiple)


def _with_masks(passages: Sequence[Passage], tokenizer: Any, limit: int) -> TokenSequences:
    """With the tokens that texts begin and end with; what is too long loses its beginning."""
    read = tokenizer([one.text for one in passages], verbose=False)["input_ids"]
    texts = []
    for passage, ids in zip(passages, read, strict=True):
        if len(ids) > limit:
            ids = ids[:1] + ids[len(ids) - limit + 1 :]
        if tokenizer.mask_token_id not in ids:
            raise UsageError(
                f"{passage.where}: max_length={limit} cut off the mask; what follows {{label}} "
                "in the template is too long."
            )
        texts.append((ids, [False] * len(ids)))
    return TokenSequences.of(texts)


def _filled(template: str, line: Line) -> str:
    return _SLOT.sub(lambda slot: line.text(slot[1]), template)


def _one_token(texts: TokenSequences, count: int) -> Tensor | None:
    """int64 [classes], where the texts of a row differ in one last token, the same in all rows."""
    if bool((texts.lengths.view(-1, count) != texts.lengths[::count, None]).any()):
        return None
    last = texts.tokens[texts.start + texts.lengths - 1].long().view(-1, count)
    asked = torch.stack([part.sum() for part in texts.asked.split(texts.lengths.tolist())])
    alike = bool((last == last[0]).all()) and bool((asked == 1).all())
    if not alike or len(last[0].unique()) < count:
        return None
    parts = texts.tokens.split(texts.lengths.tolist())
    same = all(torch.equal(parts[i][:-1], parts[i - i % count][:-1]) for i in range(len(parts)))
    return last[0] if same else None


def _label(line: Line, key: str) -> Label:
    value = line.value(key)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UsageError(f"{line.where}: {key!r} must be an integer or a string, got {value!r}.")
    return value
