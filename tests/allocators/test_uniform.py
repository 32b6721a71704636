"""What is special to Uniform; the rest is in the conformance suite."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fwdlearn.allocators import Uniform
from fwdlearn.keys import Key


@pytest.mark.parametrize(
    ("sharing", "directions"), [("private", 15), ("shared", 3), (1, 15), (2, 9), (5, 3), (8, 3)]
)
def test_sharing(sharing: str | int, directions: int) -> None:
    plan, state = Uniform(3, sharing).allocate(5, {}, None, key=Key.root(0))
    assert plan.counts.tolist() == [3] * 5 and plan.directions == directions
    assert state is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 0}, "Uniform(directions=...) must be at least 1, got 0."),
        ({"directions": True}, "Uniform(directions=...) must be at least 1, got True."),
        ({"sharing": "all"}, "must be 'private', 'shared' or a number of rows of at least 1, got "),
        ({"sharing": 0}, "Uniform(sharing=...) must be 'private'"),
        ({"sharing": True}, "got True."),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Uniform(**settings)
