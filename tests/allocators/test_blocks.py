"""What is special to Blocks; the rest is in the conformance suite."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fwdlearn.allocator import Block, Feedback
from fwdlearn.allocators import Blocks
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key


def probabilities(allocator: Blocks, sizes: list[float], steps: int = 400) -> list[float]:
    """After many steps in which block s has an estimate of squared norm sizes[s]."""
    state = allocator.init()
    for step in range(steps):
        plan, state = allocator.allocate(2, {}, state, key=Key.root(0).fold(step))
        assert plan.block is not None
        told = sizes[plan.block.number] / plan.block.probability**2
        state = allocator.observe(plan, {}, Feedback(1.0, told, {}, 1.0), state)
    return allocator._probability(state).tolist()


def test_optimal_probabilities_are_those_of_the_roots() -> None:
    found = probabilities(Blocks(("a", "b", "c"), explore=0.1), [9.0, 1.0, 36.0])
    exact = [0.9 * root / 10 + 0.1 / 3 for root in (3, 1, 6)]
    assert found == pytest.approx(exact)


def test_the_bandit_finds_the_block_that_matters() -> None:
    allocator = Blocks(("a", "b", "c"), rule="bandit", explore=0.3, rate=1.0)
    found = probabilities(allocator, [0.01, 0.01, 4.0], steps=1500)
    assert found[2] > 0.5 and min(found) >= 0.1


def test_uniform_stays() -> None:
    assert probabilities(Blocks(("a", "b"), rule="uniform"), [1.0, 9.0]) == [0.5, 0.5]


def test_names_belong_to_the_first_pattern() -> None:
    names = ["head.bias", "head.weight", "body.weight"]
    assert Block(("head.*", "*"), 0, 0.5).names(names) == ("head.bias", "head.weight")
    assert Block(("head.*", "*"), 1, 0.5).names(names) == ("body.weight",)
    with pytest.raises(UsageError, match="the parameter body.weight matches none of the blocks"):
        Block(("head.w*", "head.b*"), 0, 0.5).names(names)
    with pytest.raises(UsageError, match="the block 'head.x' has no parameter of its own"):
        Block(("head.x", "*"), 0, 0.5).names(names)


def test_a_block_is_kept_and_some_parameters_stay() -> None:
    """LISA: a layer for so many steps, embeddings and head in every one."""
    layers = ("layers.0.*", "layers.1.*", "layers.2.*")
    allocator = Blocks(layers, rule="uniform", keep=3, always=("embed*", "head.*"))
    names = ["embed", "layers.0.w", "layers.1.w", "layers.2.w", "head.w"]
    state, seen = allocator.init(), []
    for step in range(300):
        plan, state = allocator.allocate(2, {}, state, key=Key.root(1).fold(step))
        assert plan.block is not None
        own = plan.block.names(names)
        assert own == ("embed", names[1 + plan.block.number], "head.w")
        assert [plan.block.factor(name) for name in own] == pytest.approx([1, 3, 1])
        seen.append(plan.block.number)
        told = Feedback(1.0, 9.0 + 5.0, {"embed": 2.0, own[1]: 9.0, "head.w": 3.0}, 1.0)
        state = allocator.observe(plan, {}, told, state)
    assert all(seen[i] == seen[i + 1] == seen[i + 2] for i in range(0, 300, 3))
    # Each about a third of the time, within five standard errors of a hundred draws.
    assert all(abs(seen[::3].count(number) - 100 / 3) < 24 for number in range(3))
    # What is always there is no part of what a block has to gain.
    assert state["sizes"].tolist() == pytest.approx([1.0, 1.0, 1.0])
    with pytest.raises(UsageError, match="no parameter matches tail"):
        Block(("*",), 0, 1.0, ("tail.*",)).names(names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": ("*",)}, "Blocks(blocks=...) must be two patterns or more, got ('*',)."),
        ({"rule": "best"}, "Blocks(rule=...) must be optimal, bandit or uniform, got 'best'."),
        ({"explore": 0.0}, "Blocks(explore=...) must be in (0, 1], got 0.0."),
        ({"memory": 1.0}, "Blocks(memory=...) must be in [0, 1), got 1.0."),
        ({"rate": 0.0}, "Blocks(rate=...) must be positive, got 0.0."),
        ({"keep": 0}, "Blocks(keep=...) must be at least 1, got 0."),
        ({"directions": 0}, "Blocks(directions=...) must be at least 1, got 0."),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Blocks(**{"blocks": ("a", "b"), **settings})
