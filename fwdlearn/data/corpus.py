"""Running text, for plain language modelling: at each token, the next is asked."""

from __future__ import annotations

from pathlib import Path

import torch

from fwdlearn.data.files import existing, text_of
from fwdlearn.data.fresh import check_counts
from fwdlearn.data.language import SaidRows, Unread
from fwdlearn.data.lines import Files, objects
from fwdlearn.data.passages import LanguageProcessor, Passage, TokenSequences, tokenised
from fwdlearn.data.series import split_at
from fwdlearn.data.types import Data, DataInfo
from fwdlearn.errors import UsageError

INFO = DataInfo("language", (), None, per_step=True)


def corpus(
    path: str | Path,
    evaluation_path: str | Path | None = None,
    evaluation_fraction: float | None = None,
    text: str = "text",
    tokens: int = 64,
    pad_to_multiple: int = 8,
    train_rows: int | None = None,
    evaluation_rows: int | None = None,
    split_seed: int = 0,
) -> Data:
    """Loads text for a language model of transformers.

    A `.jsonl` file, or a folder with train.jsonl, has one text a line and is a row each, with the
    end of the text as its last token. Any other file is one long text, cut into rows of `tokens`
    tokens, of which the first is what comes before.

    Args:
        path: a file, or a folder with train.jsonl and perhaps validation.jsonl or test.jsonl.
        evaluation_path: the same for evaluation.
        evaluation_fraction: share held out for evaluation, above 0 and below 1: some of the rows
            of a .jsonl file, the end of a text.
        text: key of the text in a .jsonl file.
        tokens: of a row, at most, at least 2; what is longer is cut at its end.
        pad_to_multiple, train_rows, evaluation_rows, split_seed: see `fwdlearn.data.jsonl`.

    Raises:
        MissingError: no such file or folder.
        UsageError: anything wrong in a file, or an argument is out of range.
    """
    check_counts("corpus", pad_to_multiple=pad_to_multiple)
    if tokens < 2:
        raise UsageError(f"corpus(tokens=...) must be at least 2, got {tokens!r}.")
    place = existing(path, "corpus(path=...)", "a text, or a .jsonl file or folder of texts")
    limits = (train_rows, evaluation_rows, split_seed)
    files = Files("corpus", path, evaluation_path, evaluation_fraction, *limits)
    if not place.is_dir() and place.suffix != ".jsonl":
        return _running(place, files, tokens, pad_to_multiple)

    def read(file: Path) -> list[Passage]:
        example = f'{{"{text}": "..."}}'
        return [Passage(x.text(text), None, x.where, True) for x in objects(file, example)]

    held, train, other = files.divided(read, lambda passages: passages)

    def dataset(passages: list[Passage], index: torch.Tensor) -> Unread:
        chosen = [passages[i] for i in index.tolist()]

        def make(made: LanguageProcessor) -> SaidRows:
            limit = made.limit(tokens)
            texts = tokenised(chosen, made.tokenizer, limit, cut="end")
            return SaidRows(texts, made.tokenizer.pad_token_id or 0, limit, pad_to_multiple)

        return Unread("corpus", len(chosen), make)

    return Data(INFO, dataset(held, train), None if other is None else dataset(*other))


def _running(place: Path, files: Files, tokens: int, multiple: int) -> Data:
    """One long text, and perhaps another one for evaluation."""
    text, other = text_of(place), None
    if files.evaluation_path is not None:
        other = text_of(existing(files.evaluation_path, "corpus(evaluation_path=...)", "a text"))
    elif files.evaluation_fraction is not None:
        argument = "corpus(evaluation_fraction=...)"
        split = split_at(len(text), files.evaluation_fraction, argument)
        text, other = text[:split], text[split:]

    def dataset(part: str, name: str, most: int | None) -> Unread:
        def make(made: LanguageProcessor) -> SaidRows:
            read = made.tokenizer(part, add_special_tokens=False, verbose=False)
            ids, length = read["input_ids"], made.limit(tokens)
            # Rows meet in one token, which is the last of the one and comes before the other.
            rows = [ids[i : i + length] for i in range(0, len(ids) - 1, length - 1)][:most]
            if not rows:
                raise UsageError(f"{place}: the {name} text has fewer than two tokens.")
            texts = TokenSequences.of([(row, [True] * len(row)) for row in rows])
            return SaidRows(texts, made.tokenizer.pad_token_id or 0, length, multiple)

        # How many rows there are is known once it is tokenised; one is enough until then.
        return Unread("corpus", 1, make)

    train = dataset(text, "training", files.train_rows)
    if other is None:
        return Data(INFO, train)
    return Data(INFO, train, dataset(other, "evaluation", files.evaluation_rows))
