"""A small language model and its tokenizer, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fwdlearn.baselines.pretrain import bpe_tokenizer, write_untrained

TEXTS = (
    "It was great. It was terrible. A film of two hours, and none too many!",
    "the quick brown fox jumps over the lazy dog; it was good, it was bad, it was great",
) * 3


def causal_folder(folder: Path, texts: Iterable[str] = TEXTS, vocabulary: int = 360) -> Path:
    """A Llama with first weights, as `save_pretrained` leaves it."""
    write_untrained(folder, bpe_tokenizer(texts, vocabulary, 64), 16, 2)
    return folder


def lines(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file
