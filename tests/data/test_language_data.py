"""Rows for language models: what is asked for, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fwdlearn.baselines.pretrain import bpe_tokenizer
from fwdlearn.data import Data, chats, completions, corpus, label_words, multiple_choice
from fwdlearn.data.buckets import bucketed
from fwdlearn.data.language import OptionRows, SaidRows, WordRows
from fwdlearn.data.passages import LanguageProcessor
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.keys import Key
from fwdlearn.objectives import NOT_COUNTED
from tests.models.language_models import TEXTS, lines

pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = bpe_tokenizer(TEXTS, 360, 64)
    made.chat_template = TEMPLATE
    return made


def read(data: Data, tokenizer: Any, masked: bool = False) -> Any:
    return data.prepared(LanguageProcessor(tokenizer, masked)).train


def asked(batch: Any, tokenizer: Any) -> list[str]:
    rows = batch.targets.tolist()
    return [tokenizer.decode([t for t in row if t != NOT_COUNTED]) for row in rows]


def test_a_long_text_is_asked_for_once(tmp_path: Path, tokenizer: Any) -> None:
    text = " ".join(TEXTS)
    (tmp_path / "a.txt").write_text(text, "utf-8")
    rows = read(corpus(tmp_path / "a.txt", tokens=9), tokenizer)
    batch = rows.batch(torch.arange(len(rows)))
    ids = tokenizer(text)["input_ids"]
    said = [token for row in batch.targets.tolist() for token in row if token != NOT_COUNTED]
    assert said == ids[1:] and batch.kwargs["input_ids"].shape[1] == 8
    # Each is asked for after the one before it.
    shown = batch.kwargs["input_ids"].gather(1, batch.kwargs["places"])
    assert shown[batch.targets != NOT_COUNTED].tolist() == ids[:-1]


def test_the_end_of_a_text_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("great " * 100 + "terrible " * 100, "utf-8")
    data = corpus(tmp_path / "a.txt", tokens=9, evaluation_fraction=0.5, train_rows=2)
    data = data.prepared(LanguageProcessor(tokenizer))
    assert len(data.train) == 2 and data.evaluation is not None
    for dataset, word in ((data.train, "great"), (data.evaluation, "terrible")):
        assert word in asked(dataset.batch(torch.arange(2)), tokenizer)[1]


def test_a_text_a_line_ends(tmp_path: Path, tokenizer: Any) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "It was great."}, {"text": "bad film"})
    rows = read(corpus(file), tokenizer)
    said = asked(rows.batch(torch.arange(2)), tokenizer)
    assert [text.endswith("<end>") for text in said] == [True, True]
    assert said[0] == tokenizer.decode(tokenizer("It was great.")["input_ids"][1:]) + "<end>"


def test_prompts_are_not_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "A film of two hours: it was", "completion": " great, not bad"}
    file = lines(tmp_path / "a.jsonl", row, {"prompt": "x", "completion": " great"})
    rows = read(completions(file), tokenizer)
    assert isinstance(rows, SaidRows)
    batch = rows.batch(torch.arange(2))
    assert asked(batch, tokenizer) == [" great, not bad<end>", " great<end>"]
    assert batch.passes == 1
    # A prompt that is too long loses its beginning, and no completion.
    short = read(completions(file, max_length=9), tokenizer)
    assert int(short.lengths.max()) == 9
    assert asked(short.batch(torch.arange(2)), tokenizer) == asked(batch, tokenizer)


def test_answers_have_their_prompt_and_room(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "A film of two hours", "completion": " great"}
    file = lines(tmp_path / "a.jsonl", row, {"prompt": "it was", "completion": " bad"})
    data = completions(file, file, new_tokens=3, train_on="answers")
    data = data.prepared(LanguageProcessor(tokenizer))
    assert data.evaluation is not None
    batch = data.train.batch(torch.arange(2))
    assert set(batch.kwargs) == {"prompt_ids", "prompt_mask", "room"} and batch.passes == 3
    assert batch.kwargs["room"].shape == (2, 3)
    prompts, mask = batch.kwargs["prompt_ids"], batch.kwargs["prompt_mask"].bool()
    assert mask[:, -1].all() and not mask[1, 0]
    found = [tokenizer.decode(ids[kept]) for ids, kept in zip(prompts, mask, strict=True)]
    assert found == ["A film of two hours", "it was"]
    both = data.evaluation.batch(torch.arange(2))
    assert {"places", "room"} <= set(both.kwargs) and both.passes == 4


def test_only_the_assistant_is_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    said = ("good morning", "it was great", "it was bad")
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": said[0]},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": said[1]},
    ]
    short = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said[2]}]
    file = lines(tmp_path / "a.jsonl", {"messages": talk}, {"messages": short})
    batch = read(chats(file), tokenizer).batch(torch.arange(2))
    assert asked(batch, tokenizer) == [f"{said[0]}\n{said[1]}\n", f"{said[2]}\n"]


def test_words_of_one_token_cost_one_query(tmp_path: Path, tokenizer: Any) -> None:
    file = lines(
        tmp_path / "a.jsonl", {"text": "two hours", "label": 1}, {"text": "fox", "label": 0}
    )
    rows = read(label_words(file, ("bad", "great"), "{text}: it was {label}!"), tokenizer)
    assert isinstance(rows, WordRows)
    batch = rows.batch(torch.arange(2))
    assert batch.passes == 1 and batch.targets.tolist() == [1, 0]
    assert [tokenizer.decode(word) for word in batch.kwargs["choices"][0].tolist()] == [
        " bad",
        " great",
    ]
    place, kept = batch.kwargs["places"], batch.kwargs["attention_mask"]
    # The model is asked after the last token of the prompt.
    assert place.squeeze(1).tolist() == (kept.sum(1) - 1).tolist()
    assert tokenizer.decode(batch.kwargs["input_ids"][1][kept[1].bool()]) == "fox: it was"


def test_longer_words_are_read_each(tmp_path: Path, tokenizer: Any) -> None:
    file = lines(
        tmp_path / "a.jsonl", {"text": "two hours", "label": 1}, {"text": "fox", "label": 0}
    )
    rows = read(label_words(file, ("utter rubbish", "great")), tokenizer)
    assert isinstance(rows, OptionRows)
    batch = rows.batch(torch.arange(2))
    assert batch.passes == 2 and batch.kwargs["input_ids"].shape[:2] == (2, 2)
    options = batch.kwargs["options"]
    said = [tokenizer.decode(option[option >= 0]) for option in options.flatten(0, 1)]
    assert said == [" utter rubbish", " great"] * 2
    assert batch.kwargs["divisors"].tolist() == (options >= 0).sum(-1).tolist()


def test_options_that_are_not_there_are_not_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    file = lines(
        tmp_path / "a.jsonl",
        {"prompt": "the dog", "options": ["was bad", "jumps"], "label": "jumps"},
        {"prompt": "it was", "options": ["great", "bad", "good"], "label": 0},
    )
    data = multiple_choice(file, score="sum")
    assert data.info.classes == 3
    batch = read(data, tokenizer).batch(torch.arange(2))
    assert batch.targets.tolist() == [1, 0] and batch.passes == 3
    assert batch.kwargs["divisors"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_buckets_are_batches_of_like_rows() -> None:
    key, lengths = Key.root(3), torch.randint(1, 100, (205,), generator=torch.Generator())
    order = key.permutation(205)
    made = bucketed(order, lengths, 10, 8, key)
    assert torch.equal(made, bucketed(order, lengths, 10, 8, key))
    assert len(made) == 200 and len(made.unique()) == 200
    longest = lengths[made].view(-1, 10).amax(1)
    padding = [int((10 * lengths[o[:200]].view(-1, 10).amax(1)).sum()) for o in (made, order)]
    assert padding[0] < 0.75 * padding[1]
    # Not from short to long.
    assert not torch.equal(longest, longest.sort().values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: corpus(d / "no.txt"), "there is no"),
        (lambda d: corpus(d / "t.txt", tokens=1), r"corpus\(tokens=...\) must be at least 2"),
        (lambda d: completions(d / "b.jsonl"), "b.jsonl:1: the key 'completion' is missing"),
        (lambda d: completions(d / "e.jsonl"), "e.jsonl:1: no token is asked for"),
        (lambda d: completions(d / "c.jsonl", train_on="answers"), "needs new_tokens"),
        (lambda d: completions(d / "c.jsonl", new_tokens=0), "must be at least 1"),
        (lambda d: chats(d / "m.jsonl"), "m.jsonl:1: no message of 'messages' has the role"),
        (lambda d: chats(d / "n.jsonl"), "n.jsonl:1: 'messages' must be a list of"),
        (lambda d: label_words(d / "l.jsonl", ("a", "b"), "{text}"), "must hold {label} once"),
        (lambda d: label_words(d / "l.jsonl", ("a", "b", "c")), "one word for each of the classes"),
        (lambda d: label_words(d / "l.jsonl", ("a", "a")), "must differ"),
        (lambda d: label_words(d / "l.jsonl", ("a", "b"), "{x} {label}"), "key 'x' is missing"),
        (lambda d: multiple_choice(d / "o.jsonl"), "o.jsonl:1: 'options' must be a list of two"),
        (lambda d: multiple_choice(d / "p.jsonl"), "p.jsonl:1: 'label' must be the number"),
    ],
)
def test_what_is_wrong_is_said(make: Any, message: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.txt").write_text("It was great.", "utf-8")
    lines(tmp_path / "b.jsonl", {"prompt": "a"})
    lines(tmp_path / "c.jsonl", {"prompt": "a", "completion": " b"})
    lines(tmp_path / "m.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    lines(tmp_path / "n.jsonl", {"messages": "hello"})
    lines(tmp_path / "l.jsonl", {"text": "a", "label": 0}, {"text": "b", "label": 1})
    lines(tmp_path / "o.jsonl", {"prompt": "a", "options": ["b"], "label": 0})
    lines(tmp_path / "p.jsonl", {"prompt": "a", "options": ["b", "c"], "label": 2})
    lines(tmp_path / "e.jsonl", {"prompt": "", "completion": "a"})
    if "e.jsonl" in message:
        tokenizer = bpe_tokenizer(TEXTS, 360, 1)
    with pytest.raises((UsageError, MissingError), match=message):
        read(make(tmp_path), tokenizer)


def test_a_model_that_says_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("It was great.", "utf-8")
    data = corpus(tmp_path / "t.txt")
    with pytest.raises(UsageError, match="this model does not say any; choose the model"):
        data.prepared(None)
    with pytest.raises(UsageError, match="not tokenised yet"):
        data.train.batch(torch.arange(1))
