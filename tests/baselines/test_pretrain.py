from __future__ import annotations

from pathlib import Path

import pytest

from fwdlearn.baselines.pretrain import bpe_tokenizer, pretrain
from fwdlearn.errors import UsageError

library = pytest.importorskip("transformers")


def test_a_model_of_a_text_loads_offline_and_knows_it(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("It was great, and it was good. " * 100, "utf-8")
    told: list[str] = []
    sizes = {"vocabulary": 280, "width": 16, "layers": 1, "tokens": 17}
    figures = pretrain(tmp_path / "t.txt", tmp_path / "m", **sizes, steps=60, tell=told.append)
    # Of 280 tokens, told nothing of the text, each would cost 8.1.
    assert figures["bits"] < 6 and len(told) == 10
    tokenizer = library.AutoTokenizer.from_pretrained(tmp_path / "m", local_files_only=True)
    library.AutoModelForCausalLM.from_pretrained(tmp_path / "m", local_files_only=True)
    # Bytes that the text does not have are tokens too.
    assert tokenizer.decode(tokenizer("Übung: 東京")["input_ids"]) == "Übung: 東京"
    with pytest.raises(UsageError, match="is there already"):
        pretrain(tmp_path / "t.txt", tmp_path / "m")


def test_sizes_are_checked(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("It was great.", "utf-8")
    with pytest.raises(UsageError, match="vocabulary must be at least 257"):
        bpe_tokenizer(["a"], 256, 8)
    with pytest.raises(UsageError, match="width must be a multiple of 16"):
        pretrain(tmp_path / "t.txt", tmp_path / "m", width=20)
