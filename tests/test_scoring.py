from __future__ import annotations

import pytest
import torch

from fwdlearn.errors import UsageError
from fwdlearn.objectives import class_f1, score
from fwdlearn.scoring import accuracy, exact_match, f1, pairs, scores, without_letter


def test_texts_are_compared_in_words() -> None:
    assert exact_match("The  cat!", "a cat") == 1 and exact_match("cat", "cats") == 0
    assert f1("the black cat sat", "a cat sat down") == pytest.approx(2 * 2 / (3 + 3))
    assert f1("", "") == 1 and f1("", "cat") == 0


def test_classes_and_sequences_of_them() -> None:
    output = torch.eye(3)[torch.tensor([0, 2])]
    targets = torch.tensor([0, 1])
    assert pairs(output, targets) == [(0, 0), (2, 1)]
    assert scores(accuracy, output, targets).tolist() == [1, 0]
    steps = torch.eye(3)[torch.tensor([[0, 2, 1]])]
    asked = torch.tensor([[0, -100, 2]])
    assert pairs(steps, asked) == [([0, 1], [0, 2])]
    assert scores(accuracy, steps, asked).tolist() == [0.5]
    assert scores(f1, steps, asked).tolist() == [0.5]
    assert scores(exact_match, steps, asked).tolist() == [0]


def test_a_metric_that_fails_is_named_with_its_row() -> None:
    def broken(prediction: int, target: int) -> float:
        raise ZeroDivisionError("oh")

    with pytest.raises(UsageError, match="the metric broken failed on the prediction 0 and"):
        score(torch.eye(2), torch.tensor([0, 1]), broken)
    with pytest.raises(UsageError, match="a metric needs answers, or logits with a class"):
        pairs(torch.zeros(2, 1), torch.zeros(2, 1))


def test_class_f1_is_zero_at_the_level_and_falls_with_f1() -> None:
    targets = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    for chosen in ([1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]):
        found = torch.tensor(chosen)
        right = int((found & targets).sum())
        level = 2 * right / int(found.sum() + targets.sum())
        output = torch.eye(2)[found]
        assert float(class_f1(output, targets, level).mean()) == pytest.approx(0, abs=1e-6)
        assert float(class_f1(output, targets, level - 0.1).mean()) < 0
        assert float(class_f1(output, targets, level + 0.1).mean()) > 0
    with pytest.raises(UsageError, match=r"class_f1\(level=...\) must be above 0"):
        class_f1(torch.eye(2), torch.tensor([0, 1]), 0)


def test_words_without_a_letter() -> None:
    assert without_letter("A film of Two hours -- Eek!", "") == pytest.approx(5 / 6)
    assert without_letter("...", "") == 0 and without_letter("sea", "", letter="x") == 1
