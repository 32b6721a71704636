from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fwdlearn.data import Rows, csv
from fwdlearn.errors import MissingError, UsageError

TABLE = "a,b,kind\n1,10,cat\n2,10,dog\n3,10,cat\n6,10,dog\n"


def write(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def inputs(rows: object) -> torch.Tensor:
    assert isinstance(rows, Rows)
    return rows.inputs


def test_standardised_by_the_training_rows(tmp_path: Path) -> None:
    other = write(tmp_path, "b,kind,a\n11,dog,3\n", "e.csv")
    data = csv(write(tmp_path, TABLE), target="kind", evaluation_path=other)
    assert (data.info.kind, data.info.shape, data.info.labels) == ("features", (2,), ("cat", "dog"))
    train = inputs(data.train)
    assert train[:, 0].mean().abs() < 1e-6 and abs(train[:, 0].std(correction=0) - 1) < 1e-6
    assert train[:, 1].tolist() == [0, 0, 0, 0]
    assert inputs(data.evaluation).tolist() == [[0, 1]]


def test_split_measures_the_training_part_only(tmp_path: Path) -> None:
    lines = [f"{i * i},{i % 2}" for i in range(20)]
    path = write(tmp_path, "\n".join(["x,y", *lines]))
    data = csv(path, target="y", evaluation_fraction=0.25)
    assert inputs(data.train).mean().abs() < 1e-6
    assert inputs(data.evaluation).mean().abs() > 1e-3
    again = csv(path, target="y", evaluation_fraction=0.25)
    assert torch.equal(inputs(data.evaluation), inputs(again.evaluation))


def test_regression_features_delimiter_and_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbfname;x;y\r\nfoo;1;0.5\r\n"b;r";2;1e3\r\n\r\n')
    data = csv(path, target="y", features=["x"], regression=True, standardise=False, delimiter=";")
    assert data.info.classes is None and data.info.outputs == 1
    batch = data.train.batch(torch.arange(2))
    assert batch.args[0].tolist() == [[1], [2]] and batch.targets.tolist() == [[0.5], [1000]]


def test_number_labels_sort_as_numbers(tmp_path: Path) -> None:
    data = csv(write(tmp_path, "x,y\n1,10\n2,9\n"), target="y")
    assert data.info.labels == ("9", "10")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv: the file is empty; it must hold at least one row"),
        ("a,b,kind\n", "t.csv: only a header and no rows"),
        ("a,b,kind\n1,2,cat\n1,2\n", "t.csv:3: 2 fields, the header names 3; every line must have"),
        ("a,b,kind\n1,2,3,cat\n", "t.csv:2: 4 fields"),
        ("a,b,kind\n1,nan,cat\n", "t.csv:2: column 'b' must hold finite numbers, got 'nan'; fill"),
        ("a,b,kind\n1,2,cat\n1,-inf,cat\n", "t.csv:3: column 'b' must hold finite numbers"),
        ("a,b,kind\n1,1e99,cat\n", "column 'b' must hold finite numbers, got '1e99'"),
        ("a,b,kind\n1,,cat\n", "t.csv:2: column 'b' must hold numbers, got ''. Correct it, or"),
        ("a,b,kind\n1,x,cat\n", "t.csv:2: column 'b' must hold numbers, got 'x'"),
        ("a,b,kind\n1,2, \n", "t.csv:2: the target 'kind' is empty; remove the line"),
        ("a,b,kinds\n1,2,3\n", "t.csv:1: there is no column 'kind' in a, b, kinds. Did you mean"),
        ("a,a,kind\n1,2,3\n", "t.csv:1: the column 'a' is named twice; names must differ"),
        ("kind\ncat\n", "t.csv:1: the features must be one or more columns other than the target"),
        ("a,kind\n1,cat\n2,cat\n", "every training row has the label 'cat'; classification needs"),
        ('a,kind\n1,"cat\n', "t.csv:2: not a readable table .*check quotes and delimiter"),
        (b"a,kind\n1,cat\n2,\xff\n", "t.csv:3: byte 15 is not UTF-8 text; save the file as UTF-8"),
        (b"a,kind\n1,c\x00t\n", "t.csv"),
    ],
)
def test_hostile_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        csv(write(tmp_path, text), target="kind")


def test_unknown_class_in_evaluation(tmp_path: Path) -> None:
    other = write(tmp_path, "a,b,kind\n1,2,cat\n1,2,dgo\n", "e.csv")
    with pytest.raises(UsageError, match="e.csv:3: the label 'dgo' does not .* nearest is 'dog'"):
        csv(write(tmp_path, TABLE), target="kind", evaluation_path=other)


def test_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, TABLE)
    with pytest.raises(MissingError, match=r"csv\(path=...\): there is no .*relative paths start"):
        csv(tmp_path / "none.csv", target="kind")
    with pytest.raises(UsageError, match="not both"):
        csv(path, target="kind", evaluation_path=path, evaluation_fraction=0.5)
    with pytest.raises(UsageError, match=r"csv\(delimiter=...\) must be one character, got '::'"):
        csv(path, target="kind", delimiter="::")
    with pytest.raises(UsageError, match="t.csv:2: column 'kind' must hold numbers, got 'cat'"):
        csv(path, target="kind", regression=True)
