from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fwdlearn.data import Data, TokenRows, jsonl
from fwdlearn.errors import MissingError, UsageError

REVIEWS = Path(__file__).parents[3] / "shared" / "data" / "movie-reviews"


class Words:
    """A tokenizer of one token a word: its number of letters."""

    model_max_length = 20
    pad_token_id = 99
    pad_token_type_id = 0
    calls = 0

    def __call__(
        self, texts: list[str], pairs: list[str] | None = None, *, max_length: int, **_: Any
    ) -> dict[str, list[list[int]]]:
        Words.calls += 1
        first = [[len(word) for word in text.split()] for text in texts]
        second = [[len(word) for word in text.split()] for text in pairs or [""] * len(texts)]
        ids = [(a + b)[:max_length] for a, b in zip(first, second, strict=True)]
        kinds = [
            ([0] * len(a) + [1] * len(b))[:max_length] for a, b in zip(first, second, strict=True)
        ]
        return {"input_ids": ids, "token_type_ids": kinds}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [
    {"text": "a bb ccc", "label": 1},
    {"text": "dddd", "label": 0},
    {"text": "a b c d e f g h i", "label": 1},
]


def tokens(data: Data) -> TokenRows:
    assert isinstance(data.train, TokenRows)
    return data.train


def test_tokenised_once_and_padded_to_the_longest_of_a_batch(tmp_path: Path) -> None:
    data = jsonl(write(tmp_path / "a.jsonl", *ROWS), pad_to_multiple=4)
    assert (data.info.kind, data.info.classes, data.info.labels) == ("text", 2, ("0", "1"))
    Words.calls = 0
    prepared = data.prepared(Words())
    batch = prepared.train.batch(torch.tensor([1, 0]))
    assert batch.args == ()
    assert batch.kwargs["input_ids"].tolist() == [[4, 99, 99, 99], [1, 2, 3, 99]]
    assert batch.kwargs["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]
    assert batch.kwargs["token_type_ids"].tolist() == [[0] * 4] * 2
    assert {value.dtype for value in batch.kwargs.values()} == {torch.int64}
    assert batch.targets.tolist() == [0, 1]
    assert prepared.train.batch(torch.tensor([2])).kwargs["input_ids"].shape == (1, 12)
    assert Words.calls == 1


def test_padding_never_exceeds_the_limit(tmp_path: Path) -> None:
    data = jsonl(write(tmp_path / "a.jsonl", *ROWS), max_length=6, pad_to_multiple=4)
    batch = data.prepared(Words()).train.batch(torch.tensor([2, 1]))
    assert batch.kwargs["input_ids"].shape == (2, 6)


def test_pairs(tmp_path: Path) -> None:
    rows = [{"q": "aa", "a": "b b", "y": "no"}, {"q": "a", "a": "b", "y": "yes"}]
    path = write(tmp_path / "a.jsonl", *rows)
    data = jsonl(path, text="q", text_pair="a", label="y", pad_to_multiple=1).prepared(Words())
    batch = data.train.batch(torch.tensor([0]))
    assert batch.kwargs["input_ids"].tolist() == [[2, 1, 1]]
    assert batch.kwargs["token_type_ids"].tolist() == [[0, 1, 1]]
    assert data.info.labels == ("no", "yes")


def test_folder_prefers_validation(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *ROWS)
    assert jsonl(tmp_path).evaluation is None
    write(tmp_path / "test.jsonl", ROWS[0])
    data = jsonl(tmp_path)
    assert data.evaluation is not None and len(data.evaluation) == 1
    write(tmp_path / "validation.jsonl", *ROWS[:2])
    data = jsonl(tmp_path)
    assert data.evaluation is not None and len(data.evaluation) == 2
    data = jsonl(tmp_path, evaluation_path=tmp_path / "train.jsonl", evaluation_rows=1)
    assert data.evaluation is not None and len(data.evaluation) == 1


def test_fraction_and_regression(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": i / 2} for i in range(10)]
    data = jsonl(write(tmp_path / "a.jsonl", *rows), evaluation_fraction=0.2, regression=True)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation), data.info.classes) == (8, 2, None)
    assert tokens(data.prepared(Words())).targets.shape == (8, 1)


def test_needs_a_tokenizer(tmp_path: Path) -> None:
    data = jsonl(write(tmp_path / "a.jsonl", *ROWS))
    with pytest.raises(UsageError, match="a.jsonl need a tokenizer, and this model brings none"):
        data.prepared(None)
    with pytest.raises(UsageError, match="are not tokenised yet: pass the model's tokenizer to"):
        data.train.batch(torch.tensor([0]))


def test_text_without_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *ROWS, {"text": " ", "label": 0})
    with pytest.raises(UsageError, match="a.jsonl:4: the text has no tokens; a row needs at least"):
        jsonl(path).prepared(Words())


GOOD = '{"text": "a", "label": 0}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl: the file is empty"),
        (" \n\n", "a.jsonl: the file is empty"),
        (
            GOOD + '{"text": "a", "lab',
            "a.jsonl:2: not JSON .*every line must be one object such as",
        ),
        (GOOD + "\n[1]\n", "a.jsonl:3: a line must be an object such as .* got list"),
        (GOOD + '{"text": "a"}\n', "a.jsonl:2: the key 'label' is missing; the line has 'text'"),
        (GOOD + '{"label": 1}\n', "a.jsonl:2: the key 'text' is missing; the line has 'label'"),
        (GOOD + '{"text": 3, "label": 1}\n', "a.jsonl:2: 'text' must be a string, got 3"),
        ('{"text": "a", "label": true}\n', "a.jsonl:1: 'label' is True; write 0 or 1 instead"),
        ('{"text": "a", "label": null}\n', "'label' must be an integer or a string, got None"),
        ('{"text": "a", "label": 0.5}\n', "got 0.5. To predict a number, set regression to true"),
        (GOOD + '{"text": "a", "label": "x"}\n', "some labels are numbers and some are text; use"),
        (GOOD, "every training row has the label 0; classification needs at least two classes"),
        ("[" * 100_000 + "\n", "a.jsonl:1: not JSON"),
    ],
)
def test_hostile_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        jsonl(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD.encode() + b"\xff")
    with pytest.raises(UsageError, match="a.jsonl:2: byte 26 is not UTF-8"):
        jsonl(tmp_path / "a.jsonl")


@pytest.mark.parametrize("label", ["NaN", "1e999", '"x"', "null"])
def test_regression_label(tmp_path: Path, label: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "label": {label}}}')
    with pytest.raises(UsageError, match="a.jsonl:1: 'label' must be a finite number, got"):
        jsonl(tmp_path / "a.jsonl", regression=True)


def test_line_separators_inside_a_string_are_text(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two", "label": 0}, {"text": "three", "label": 1}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    assert len(jsonl(tmp_path / "a.jsonl").train) == 2


def test_unknown_label_in_evaluation(tmp_path: Path) -> None:
    other = write(tmp_path / "e.jsonl", ROWS[0], {"text": "x", "label": 7})
    with pytest.raises(UsageError, match="e.jsonl:2: the label 7 does not occur in the training"):
        jsonl(write(tmp_path / "a.jsonl", *ROWS), evaluation_path=other)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"jsonl\(path=...\): there is no .*train.jsonl"):
        jsonl(tmp_path / "none")
    with pytest.raises(MissingError, match="has no train.jsonl; give the file itself if it has"):
        jsonl(tmp_path)
    path = write(tmp_path / "a.jsonl", *ROWS)
    with pytest.raises(MissingError, match="has no validation.jsonl or test.jsonl"):
        jsonl(path, evaluation_path=tmp_path)
    with pytest.raises(UsageError, match=r"jsonl\(max_length=...\) must be at least 1, got 0"):
        jsonl(path, max_length=0)


@pytest.mark.skipif(not REVIEWS.is_dir(), reason=f"needs the film reviews in {REVIEWS}")
def test_movie_reviews() -> None:
    data = jsonl(REVIEWS, train_rows=100)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation), data.info.classes) == (100, 1000, 2)
