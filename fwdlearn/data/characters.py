"""Characters of a text file: at each one, the next is asked."""

from __future__ import annotations

from pathlib import Path

import torch

from fwdlearn.data.files import existing_file, text_of
from fwdlearn.data.fresh import check_counts
from fwdlearn.data.series import Windows, split_at
from fwdlearn.data.types import Data, DataInfo
from fwdlearn.errors import UsageError


def characters(path: str | Path, steps: int = 64, evaluation_fraction: float = 0.1) -> Data:
    """Loads a text for a language model of its characters.

    Args:
        path: the file, UTF-8.
        steps: characters of a window, at least 1.
        evaluation_fraction: share of the text, its end, above 0 and below 1.

    Returns:
        Windows of tokens int64 [steps] and the tokens that follow, int64 [steps]. Training windows
        begin at every character, evaluation windows every `steps`. Classes are the characters of
        the whole file, in the order of their code points.

    Raises:
        MissingError: no such file.
        UsageError: the file is not UTF-8 or too short, or an argument is out of range.
    """
    check_counts("characters", steps=steps)
    file = existing_file(path, "characters(path=...)", "a text")
    text = text_of(file)
    labels = tuple(sorted(set(text)))
    if len(labels) < 2:
        raise UsageError(f"{file}: only the character {labels[0]!r}; there must be two or more.")
    number = {character: i for i, character in enumerate(labels)}
    tokens = torch.tensor([number[character] for character in text])
    split = split_at(len(tokens), evaluation_fraction, "characters(evaluation_fraction=...)")
    made = []
    for name, part in (("training", tokens[:split]), ("evaluation", tokens[split:])):
        windows = Windows(part[:-1], part[1:], steps, 1 if name == "training" else steps)
        if not len(windows):
            raise UsageError(
                f"{file}: {len(part)} {name} characters hold no window of steps={steps} and the "
                "character after it; give a longer text, fewer steps, or another "
                "evaluation_fraction."
            )
        made.append(windows)
    return Data(DataInfo("tokens", (steps,), len(labels), labels, per_step=True), *made)
