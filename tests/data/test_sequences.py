"""Sequences: what is asked and when, fresh rows, windows of which none sees the future."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fwdlearn.allocators import Uniform
from fwdlearn.data import (
    Data,
    adding_problem,
    characters,
    copying_memory,
    csv_series,
    delayed_recall,
    digits,
    mackey_glass,
    sequential_digits,
)
from fwdlearn.data.mackey_glass import _series as _series_of
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.estimators import CausalNodePerturbation, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.models import recurrent
from fwdlearn.objectives import cross_entropy, mean_squared_error
from fwdlearn.trainer import Trainer

FRESH: list[Callable[..., Data]] = [delayed_recall, copying_memory, adding_problem]


def _batch(data: Data, rows: int = 4) -> tuple[Tensor, Tensor]:
    batch = data.train.batch(torch.arange(rows))
    return batch.args[0], batch.targets


def _trainer(data: Data, seed: int = 0, batch_size: int = 4) -> Trainer:
    model = recurrent(data.info, hidden=[3]).module
    objective = mean_squared_error if data.info.classes is None else cross_entropy
    parts = (RandomPerturbation(), Uniform(1), torch.optim.SGD(model.parameters(), lr=0.1))
    return Trainer(model, data, objective, *parts, batch_size=batch_size, steps=3, seed=seed)


@pytest.mark.parametrize("make", FRESH)
def test_batches_are_fresh_and_functions_of_seed_and_step(make: Callable[..., Data]) -> None:
    trainer, same, other = (_trainer(make(evaluation_rows=8), seed) for seed in (0, 0, 1))
    # Asked for in another order.
    later = same.batch(2)
    batches = [trainer.batch(step) for step in range(3)]
    assert torch.equal(batches[2].args[0], later.args[0])
    assert torch.equal(batches[2].targets.nan_to_num(), later.targets.nan_to_num())
    assert trainer.data.evaluation is not None
    held = trainer.data.evaluation.batch(torch.arange(8))
    rows = [*batches, *(other.batch(step) for step in range(3)), held]
    seen = torch.cat([batch.args[0] for batch in rows]).flatten(1)
    assert len(seen.unique(dim=0)) == len(seen) == 32
    again = make(evaluation_rows=8, sequence_seed=1).train.batch(torch.arange(8))
    assert not torch.equal(again.args[0], make().train.batch(torch.arange(8)).args[0])


def test_a_large_number_makes_a_row_of_its_own() -> None:
    index = torch.tensor([5, 5 + 2**32, 5 + 2**61])
    inputs = delayed_recall().train.batch(index).args[0]
    assert len(inputs.unique(dim=0)) == 3
    assert torch.equal(inputs[:1], delayed_recall().train.batch(index[:1]).args[0])


def test_recall_asks_for_what_came_a_delay_ago() -> None:
    inputs, targets = _batch(delayed_recall(steps=9, delay=4, values=2), 300)
    assert inputs.shape == targets.shape == (300, 9, 2)
    assert targets[:, :4].isnan().all() and torch.equal(targets[:, 4:], inputs[:, :5])
    assert inputs.min() >= -1 and inputs.max() < 1
    # Of 5,400 uniform values: the mean's standard error is 0.0079, the variance's 0.0041.
    assert abs(float(inputs.mean())) < 0.04 and abs(float(inputs.var()) - 1 / 3) < 0.02


def test_copying_asks_after_the_mark() -> None:
    data = copying_memory(length=3, delay=2, symbols=4)
    inputs, targets = _batch(data, 200)
    assert inputs.shape == (200, 9, 6) and data.info.outputs == 4 and data.info.per_step
    assert (inputs.sum(2) == 1).all()
    seen = inputs.argmax(2)
    assert (seen[:, :3] < 4).all() and (seen[:, 3:5] == 4).all()
    assert (seen[:, 5] == 5).all() and (seen[:, 6:] == 4).all()
    assert (targets[:, :6] == -100).all() and torch.equal(targets[:, 6:], seen[:, :3])
    assert set(seen[:, :3].flatten().tolist()) == {0, 1, 2, 3}


def test_adding_asks_for_the_sum_of_two() -> None:
    data = adding_problem(steps=7)
    inputs, targets = _batch(data, 200)
    assert targets.shape == (200, 1) and not data.info.per_step
    numbers, marks = inputs.unbind(2)
    assert (marks[:, :3].sum(1) == 1).all() and (marks[:, 3:].sum(1) == 1).all()
    torch.testing.assert_close(targets[:, 0], (numbers * marks).sum(1))
    assert (marks.sum(0) > 0).all()


def test_mackey_glass_follows_its_equation() -> None:
    x = _series_of(1000, Key.root(0))
    slope, now, past = (x[2:] - x[:-2]) / 2, x[18:-1], x[1:-18]
    expected = 0.2 * past / (1 + past**10) - 0.1 * now
    # Differences that span two times miss a sixth of the third derivative.
    assert (slope[17:] - expected).abs().max() < 0.04 * expected.abs().max()
    assert float(x.std()) > 0.2


def test_mackey_glass_is_a_forecast() -> None:
    inputs, targets = _batch(mackey_glass(ahead=15, steps=60, washout=17, times=1000), 3)
    assert targets[:, :17].isnan().all()
    # The target comes later than the input: what is asked now is seen 15 steps on.
    assert torch.equal(targets[:, 17:45], inputs[:, 32:])


def test_windows_share_no_time_across_the_split() -> None:
    data = mackey_glass(times=400, steps=30, washout=10, ahead=5)
    train, evaluation = data.train, data.evaluation
    assert len(train) == 300 - 5 - 30 + 1 and evaluation is not None
    every = train.batch(torch.arange(len(train)))
    assert float(every.args[0].mean().abs()) < 0.2
    rows = evaluation.batch(torch.arange(len(evaluation)))
    # Each time is counted once: windows overlap by the washout alone.
    assert torch.equal(rows.args[0][1:, :10], rows.args[0][:-1, 20:])
    assert rows.targets[:, :10].isnan().all() and not rows.targets[:, 10:].isnan().any()


TABLE = "day,load,wind\n" + "".join(f"{i},{(i * 7) % 11},{i * i % 13}\n" for i in range(60))


def _series(tmp_path: Path, text: str = TABLE, **settings: Any) -> Data:
    path = tmp_path / "t.csv"
    path.write_text(text, "utf-8")
    given = {"target": "load", "steps": 6, "washout": 2, "ahead": 3, **settings}
    return csv_series(path, **given)


def test_a_series_is_scaled_by_its_past_alone(tmp_path: Path) -> None:
    data = _series(tmp_path)
    head, *lines = TABLE.splitlines()
    later = [line.split(",")[0] + ",1e6,-1e6" for line in lines[45:]]
    changed = _series(tmp_path, "\n".join([head, *lines[:45], *later]) + "\n")
    every = torch.arange(len(data.train))
    ours, theirs = data.train.batch(every), changed.train.batch(every)
    assert torch.equal(ours.args[0], theirs.args[0])
    assert torch.equal(ours.targets.nan_to_num(), theirs.targets.nan_to_num())
    known = torch.tensor([float(line.split(",")[1]) for line in lines[:45]])
    scaled = (known - known.mean()) / known.std(correction=0)
    inputs, targets = _batch(data, 1)
    # The target's past is the last input.
    assert inputs.shape == (1, 6, 3) and data.info.shape == (6, 3)
    torch.testing.assert_close(inputs[0, :, 2], scaled[:6])
    torch.testing.assert_close(targets[0, 2:, 0], scaled[5:9])
    assert len(data.train) == 45 - 3 - 6 + 1


def test_columns_of_a_series_can_be_chosen(tmp_path: Path) -> None:
    assert _series(tmp_path, features=["wind"]).info.shape == (6, 2)
    assert _series(tmp_path, features=[]).info.shape == (6, 1)


def test_characters_ask_for_the_next(tmp_path: Path) -> None:
    path, text = tmp_path / "t.txt", "the cat sat on the mat. " * 9
    path.write_text(text, "utf-8")
    data = characters(path, steps=10, evaluation_fraction=0.25)
    assert data.info.labels == tuple(sorted(set(text))) and data.info.classes == len(set(text))
    assert data.evaluation is not None
    inputs, targets = _batch(data)
    labels = data.info.labels
    for start in range(4):
        assert "".join(labels[i] for i in inputs[start]) == text[start : start + 10]
        assert "".join(labels[i] for i in targets[start]) == text[start + 1 : start + 11]
    split = len(text) - round(0.25 * len(text))
    held = data.evaluation.batch(torch.arange(len(data.evaluation)))
    assert (
        "".join(labels[i] for i in held.args[0].flatten()) == text[split:][: held.args[0].numel()]
    )
    assert len(data.train) == split - 1 - 10 + 1


def test_pixels_come_one_by_one() -> None:
    data, images = sequential_digits(), digits()
    inputs, targets = _batch(data)
    batch = images.train.batch(torch.arange(4))
    assert inputs.shape == (4, 64, 1) and data.info.shape == (64, 1) and not data.info.per_step
    assert torch.equal(inputs.view(4, 1, 8, 8), batch.args[0])
    assert torch.equal(targets, batch.targets)


def test_they_train() -> None:
    for make in FRESH:
        trainer = _trainer(make(evaluation_rows=8))
        assert trainer.train()["steps"] == 3
        assert trainer.engine.choice is not None and trainer.engine.choice.rung == "fold"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: delayed_recall(steps=5, delay=5), r"delayed_recall\(delay=...\) must be less"),
        (lambda p: delayed_recall(values=0), r"delayed_recall\(values=...\) must be at least 1"),
        (
            lambda p: delayed_recall(evaluation_rows=0),
            r"\(evaluation_rows=...\) must be at least 1",
        ),
        (lambda p: adding_problem(sequence_seed=-1), r"\(sequence_seed=...\) must lie in \[0"),
        (lambda p: copying_memory(symbols=1), r"copying_memory\(symbols=...\) must be at least 2"),
        (lambda p: adding_problem(steps=1), r"adding_problem\(steps=...\) must be at least 2"),
        (lambda p: mackey_glass(washout=40), r"mackey_glass\(washout=...\) must be at least 0 and"),
        (lambda p: mackey_glass(times=100), "25 evaluation times hold no window of steps=40"),
        (lambda p: mackey_glass(evaluation_fraction=1.0), "must be above 0 and below 1, got 1.0"),
        (lambda p: _series(p, target="lode"), "there is no column 'lode' .* Did you mean 'load'?"),
        (lambda p: _series(p, features=["load"]), "the features must be columns other than the"),
        (lambda p: _series(p, TABLE.replace("\n3,10", "\n3,x")), r"t.csv:5: .* got 'x'"),
        (
            lambda p: _series(p, delimiter=";;"),
            r"csv_series\(delimiter=...\) must be one character",
        ),
        (lambda p: characters(_text(p, "aaaa")), "only the character 'a'"),
        (lambda p: characters(_text(p, "ab" * 40)), "8 evaluation characters hold no window of st"),
        (lambda p: characters(p / "no.txt"), r"characters\(path=...\): there is no"),
    ],
)
def test_messages(make: Callable[[Path], Data], message: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, MissingError), match=message):
        make(tmp_path)


def _text(folder: Path, text: str) -> Path:
    path = folder / "t.txt"
    path.write_text(text, "utf-8")
    return path


def test_a_piece_in_which_nothing_counts_is_one_like_others() -> None:
    """The first pieces of a window are washed out; the readout gets its derivative later."""
    data = mackey_glass(times=400, steps=30, washout=20)
    model = recurrent(data.info, hidden=[3]).module
    before = model.head.weight.clone()
    parts = (CausalNodePerturbation(), Uniform(2), torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = Trainer(model, data, mean_squared_error, *parts, batch_size=4, steps=3, every=10)
    trainer.train()
    assert not torch.equal(model.head.weight, before)
