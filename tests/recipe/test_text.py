"""The scalars of YAML 1.2, and dumps that read back to the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from fwdlearn.recipe.text import dump, parse

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("012", 12),
        ("0x1F", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("", None),
        ("null", None),
        ("'1'", "1"),
        ("2026-01-01", "2026-01-01"),
        ("<<", "<<"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    source, problems = parse(f"a: {text}\n", "r")
    assert not problems
    assert source.data == {"a": value}
    assert type(source.data["a"]) is type(value)


def test_places() -> None:
    source, _ = parse("a: 1\nb:\n  - x\n  - {c: 2}\n", "r")
    assert source.keys[("b", 1, "c")] == (4, 6)
    assert source.values[("b", 1, "c")] == (4, 9)


@given(VALUES)
@example({"\x85": "\u2028\r\n\ufeff"})
def test_dump_reads_back(value: Any) -> None:
    text = dump({"value": value})
    source, problems = parse(text, "r")
    if not problems:
        assert source.data == {"value": value}
    else:  # the only values that are refused are very long integers
        assert all("digits" in problem.message for problem in problems)


@given(VALUES)
@example({"\x85": "\u2028\r\n\ufeff"})
def test_other_readers_see_the_same_types(value: Any) -> None:
    text = dump({"value": value})
    assert yaml.safe_load(text) == {"value": value}


@given(st.text(max_size=200))
def test_any_text_is_read_or_explained(text: str) -> None:
    source, problems = parse(text, "r")
    for line in source.lines(problems):
        assert line.startswith("r:")
        assert "\n" not in line


def test_infinite_numbers_never_pass() -> None:
    for text in (".inf", "-.Inf", ".nan", "1e400"):
        source, problems = parse(f"a: {text}\n", "r")
        assert problems
        assert math.isfinite(source.data["a"])
