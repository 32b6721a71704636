"""Prompts and what has to follow them; conversations; answers that a model makes itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fwdlearn.data.corpus import INFO
from fwdlearn.data.fresh import check_counts
from fwdlearn.data.language import SaidRows, Unread
from fwdlearn.data.lines import Files, Line, objects
from fwdlearn.data.passages import LanguageProcessor, Passage, tokenised
from fwdlearn.data.types import Data
from fwdlearn.errors import UsageError


def completions(
    path: str | Path,
    evaluation_path: str | Path | None = None,
    evaluation_fraction: float | None = None,
    prompt: str = "prompt",
    completion: str = "completion",
    prompt_words: int | None = None,
    new_tokens: int | None = None,
    train_on: Literal["tokens", "answers"] = "tokens",
    max_length: int | None = None,
    pad_to_multiple: int = 8,
    train_rows: int | None = None,
    evaluation_rows: int | None = None,
    split_seed: int = 0,
) -> Data:
    """Loads prompts with completions; the tokens of the completion and its end are asked for.

    With `new_tokens` the model also makes an answer of its own to each evaluation prompt, which
    metrics compare with the completion; or, with `train_on: answers`, to each training prompt too,
    for an objective such as `score`. A row then counts a query for each token of the answer.

    Args:
        path, evaluation_path, evaluation_fraction: see `fwdlearn.data.jsonl`.
        prompt: key of the prompt.
        completion: key of the completion, blank before it included; or of what an answer is
            compared with.
        prompt_words: there are no prompts in the file: so many words, or all but the last of
            fewer, are taken from the beginning of the completion. None reads `prompt`.
        new_tokens: tokens of an answer, at least 1; None asks for none.
        train_on: whether training rows ask for the completion's tokens or for an answer.
        max_length: tokens of prompt and completion, at most; a longer prompt loses its beginning.
            None: the tokenizer's limit.
        pad_to_multiple, train_rows, evaluation_rows, split_seed: see `fwdlearn.data.jsonl`.

    Raises:
        MissingError: no such file or folder.
        UsageError: anything wrong in a file, or an argument is out of range.
    """
    limits = (train_rows, evaluation_rows, split_seed)
    files = Files("completions", path, evaluation_path, evaluation_fraction, *limits)

    if prompt_words is not None:
        check_counts("completions", prompt_words=prompt_words)

    def passage(line: Line) -> Passage:
        second = line.text(completion)
        if prompt_words is None:
            first = line.text(prompt)
        else:
            words = list(re.finditer(r"\S+", second))[:-1][:prompt_words]
            begin = words[-1].end() if words else 0
            first, second = second[:begin], second[begin:]
        whole = first + second
        return Passage(whole, ((len(first), len(whole)),), line.where, True)

    given = f'"{prompt}": "...", ' if prompt_words is None else ""
    example = f'{{{given}"{completion}": "..."}}'
    return _data(
        files,
        lambda line, made: passage(line),
        example,
        max_length,
        pad_to_multiple,
        new_tokens,
        train_on,
    )


def chats(
    path: str | Path,
    evaluation_path: str | Path | None = None,
    evaluation_fraction: float | None = None,
    messages: str = "messages",
    max_length: int | None = None,
    pad_to_multiple: int = 8,
    train_rows: int | None = None,
    evaluation_rows: int | None = None,
    split_seed: int = 0,
) -> Data:
    """Loads conversations; what the assistant says is asked for, and nothing else.

    They become texts by the chat template of the model's tokenizer.

    Args:
        path, evaluation_path, evaluation_fraction: see `fwdlearn.data.jsonl`.
        messages: key of a list of `{"role": ..., "content": ...}`.
        max_length: tokens of a conversation, at most; a longer one loses its beginning.
        pad_to_multiple, train_rows, evaluation_rows, split_seed: see `fwdlearn.data.jsonl`.

    Raises:
        MissingError: no such file or folder.
        UsageError: anything wrong in a file, or the tokenizer has no template.
    """
    limits = (train_rows, evaluation_rows, split_seed)
    files = Files("chats", path, evaluation_path, evaluation_fraction, *limits)
    example = f'{{"{messages}": [{{"role": "user", "content": "..."}}, ...]}}'

    def passage(line: Line, made: LanguageProcessor) -> Passage:
        return _conversation(line, messages, made.tokenizer)

    return _data(files, passage, example, max_length, pad_to_multiple, special=False)


def _data(
    files: Files,
    passage: Callable[[Line, LanguageProcessor], Passage],
    example: str,
    max_length: int | None,
    multiple: int,
    new_tokens: int | None = None,
    train_on: str = "tokens",
    special: bool = True,
) -> Data:
    counts = {"max_length": max_length, "pad_to_multiple": multiple, "new_tokens": new_tokens}
    check_counts(files.owner, **{k: v for k, v in counts.items() if v is not None})
    if train_on == "answers" and new_tokens is None:
        raise UsageError(
            f"{files.owner}(train_on='answers') needs new_tokens, the length of an answer."
        )

    def read(file: Path) -> list[Line]:
        return list(objects(file, example))

    held, train, other = files.divided(read, lambda lines: lines)

    def dataset(lines: list[Line], index: Tensor, said: bool, new: int | None) -> Unread:
        chosen = [lines[i] for i in index.tolist()]

        def make(made: LanguageProcessor) -> SaidRows:
            limit = made.limit(max_length)
            passages = [passage(line, made) for line in chosen]
            texts = tokenised(passages, made.tokenizer, limit, special)
            return SaidRows(texts, made.tokenizer.pad_token_id or 0, limit, multiple, said, new)

        return Unread(files.owner, len(chosen), make)

    answers = train_on == "answers"
    rows = dataset(held, train, not answers, new_tokens if answers else None)
    return Data(INFO, rows, None if other is None else dataset(*other, True, new_tokens))


def _conversation(line: Line, key: str, tokenizer: Any) -> Passage:
    messages = line.value(key)
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one
        for one in messages
    ):
        raise UsageError(
            f'{line.where}: {key!r} must be a list of {{"role": ..., "content": ...}}, got '
            f"{messages!r}."
        )
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "chats needs a tokenizer with a chat template, and this one has none; give the "
            "model's folder a chat_template.jinja, or use completions."
        )

    def text(count: int, asks: bool) -> str:
        try:
            made = tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # the template's own, in a language of its own
            raise UsageError(f"{line.where}: the chat template refuses this: {error}") from error
        return str(made)

    whole = text(len(messages), False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin, end = text(number, True), text(number + 1, False)
        if not whole.startswith(begin) or not whole.startswith(end):
            raise UsageError(
                f"{line.where}: the chat template changes earlier messages when later ones "
                "come, so what the assistant says cannot be told apart; use completions."
            )
        spans.append((len(begin), len(end)))
    if not spans:
        raise UsageError(f"{line.where}: no message of {key!r} has the role 'assistant'.")
    return Passage(whole, tuple(spans), line.where)
