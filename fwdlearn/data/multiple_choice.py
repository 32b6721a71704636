"""Questions with options of their own, of which the likeliest is the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fwdlearn.data.fresh import check_counts
from fwdlearn.data.language import OptionRows, Unread
from fwdlearn.data.lines import Files, Line, objects
from fwdlearn.data.passages import LanguageProcessor, Passage, tokenised
from fwdlearn.data.types import Data, DataInfo
from fwdlearn.errors import UsageError


def multiple_choice(
    path: str | Path,
    evaluation_path: str | Path | None = None,
    evaluation_fraction: float | None = None,
    prompt: str = "prompt",
    options: str = "options",
    label: str = "label",
    between: str = " ",
    score: Literal["mean", "sum"] = "mean",
    max_length: int | None = None,
    pad_to_multiple: int = 8,
    train_rows: int | None = None,
    evaluation_rows: int | None = None,
    split_seed: int = 0,
) -> Data:
    """Loads questions; an option's score is the log-probability of its tokens after the prompt.

    A row is read with each of its options, and counts as many queries as the row with the most.

    Args:
        path, evaluation_path, evaluation_fraction: see `fwdlearn.data.jsonl`.
        prompt: key of the question.
        options: key of a list of texts, two or more.
        label: key of the right one: its number, from 0, or its text.
        between: what stands between prompt and option.
        score: whether log-probabilities of tokens are averaged or summed.
        max_length: tokens of prompt and option, at most; a longer prompt loses its beginning.
        pad_to_multiple, train_rows, evaluation_rows, split_seed: see `fwdlearn.data.jsonl`.

    Raises:
        MissingError: no such file or folder.
        UsageError: anything wrong in a file, or an argument is out of range.
    """
    counts = {"max_length": max_length, "pad_to_multiple": pad_to_multiple}
    check_counts("multiple_choice", **{k: v for k, v in counts.items() if v is not None})
    limits = (train_rows, evaluation_rows, split_seed)
    files = Files("multiple_choice", path, evaluation_path, evaluation_fraction, *limits)
    example = f'{{"{prompt}": "...", "{options}": ["...", "..."], "{label}": 0}}'

    def read(file: Path) -> tuple[list[Line], Tensor]:
        lines = list(objects(file, example))
        return lines, torch.tensor([_right(line, options, label) for line in lines])

    held, train, other = files.divided(read, lambda part: part[1])

    def dataset(part: tuple[list[Line], Tensor], index: Tensor) -> Unread:
        lines = [part[0][i] for i in index.tolist()]

        def make(made: LanguageProcessor) -> OptionRows:
            if made.masked:
                raise UsageError("multiple_choice needs a causal model; choose head=causal.")
            passages = []
            for line in lines:
                begin = line.text(prompt)
                for option in line.value(options):
                    text = begin + between + option
                    passages.append(Passage(text, ((len(begin), len(text)),), line.where))
            limit, pad = made.limit(max_length), made.tokenizer.pad_token_id or 0
            texts = tokenised(passages, made.tokenizer, limit)
            count = torch.tensor([len(line.value(options)) for line in lines])
            first = count.cumsum(0) - count
            shape = (pad, limit, pad_to_multiple)
            return OptionRows(texts, first, count, part[1][index], score == "mean", *shape)

        return Unread("multiple_choice", len(lines), make)

    parts = [held[0], *([] if other is None else [other[0][0]])]
    most = max(len(line.value(options)) for lines in parts for line in lines)
    info = DataInfo("language", (), most)
    return Data(info, dataset(held, train), None if other is None else dataset(*other))


def _right(line: Line, options: str, label: str) -> int:
    """The number of the right option."""
    given, value = line.value(options), line.value(label)
    texts = isinstance(given, list) and all(isinstance(option, str) for option in given)
    if not texts or len(given) < 2 or len(set(given)) < len(given):
        raise UsageError(
            f"{line.where}: {options!r} must be a list of two different texts or more, got "
            f"{given!r}."
        )
    if isinstance(value, str) and value in given:
        return int(given.index(value))
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(given):
        return value
    raise UsageError(
        f"{line.where}: {label!r} must be the number of an option, from 0 to {len(given) - 1}, or "
        f"its text, got {value!r}."
    )
