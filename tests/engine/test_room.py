"""Memory that runs out: smaller blocks, the same queries, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.allocators import Neyman, Uniform
from fwdlearn.engine.room import Room
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import (
    SPSA,
    ActivityForwardGradient,
    CausalNodePerturbation,
    ForwardGradient,
    LikelihoodRatio,
    NodePerturbation,
    RandomPerturbation,
    StepwiseActivityPerturbation,
    StepwiseWeightPerturbation,
)
from fwdlearn.keys import Key
from fwdlearn.objectives import mean_squared_error
from fwdlearn.step_oracle import StepOracle
from tests.engine.steps import MODELS, built, sequences
from tests.test_trainer import Memory, trainer, weights


class Tight(nn.Module):
    """Has memory for so many rows, until it has to make do with fewer.

    Args:
        rows: of a pass at most; None for as many as there are.
    """

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        for p in self.inner.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        self.rows, self.largest, self.refused = rows, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None and len(x) > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.largest = max(self.largest, len(x))
        return self.inner(x)


CASES: list[dict[str, Any]] = [
    {"estimator": RandomPerturbation(1e-2)},
    {"estimator": SPSA(1e-2)},
    {"estimator": ForwardGradient()},
    {"estimator": LikelihoodRatio()},
    {"estimator": NodePerturbation()},
    {"estimator": ActivityForwardGradient()},
    {"estimator": RandomPerturbation(1e-2), "rung": "copies"},
    {"estimator": RandomPerturbation(1e-2), "rung": "sequential"},
    {"estimator": RandomPerturbation(1e-2), "allocator": Neyman(4)},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}"[:60])
def test_the_same_queries_in_smaller_blocks(case: dict[str, Any]) -> None:
    case = {"allocator": Uniform(4), **case}
    ample, sink = Tight(None), Memory()
    tight = Tight(5)
    first = trainer(ample, steps=4, evaluation_batch_size=4, **case).train()
    second = trainer(tight, steps=4, evaluation_batch_size=4, sinks=[sink], **case).train()
    assert ample.largest > 5 >= tight.largest
    # Blocks were made smaller once and stay so.
    said = [record for record in sink.records if "engine.halvings" in record]
    assert len(said) == 1 and said[0]["step"] == 1
    assert second["engine.halvings"] == said[0]["engine.halvings"] == tight.refused > 0
    assert first["engine.halvings"] == 0
    assert first["queries"] == second["queries"]
    torch.testing.assert_close(weights(tight), weights(ample), rtol=1e-5, atol=1e-5)


def test_an_evaluation_takes_fewer_rows_at_once() -> None:
    settings = {"steps": 2, "evaluate_every": 1, "rung": "sequential", "batch_size": 4}
    found = []
    for rows in (None, 5):
        sink, model = Memory(), Tight(rows)
        trainer(model, sinks=[sink], evaluation_batch_size=16, **settings).train()
        found.append([record for record in sink.records if "eval.loss" in record])
        assert (model.largest > 5) == (rows is None)
    ample, tight = found
    # Once: the second evaluation begins with blocks of the size that was found.
    assert [record.pop("eval.halvings", 0) for record in tight] == [2, 0]
    for one, other in zip(ample, tight, strict=True):
        assert one["eval.accuracy"] == other["eval.accuracy"]
        assert one["eval.loss"] == pytest.approx(other["eval.loss"], rel=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        trainer(Tight(0), steps=1).evaluate()


@pytest.mark.parametrize("name", ["gru", "learned"])
@pytest.mark.parametrize(
    "estimator",
    [
        CausalNodePerturbation(),
        StepwiseActivityPerturbation(),
        StepwiseWeightPerturbation(),
    ],
    ids=lambda one: type(one).__name__,
)
def test_noisy_steps_in_smaller_blocks(name: str, estimator: Estimator) -> None:
    if name == "learned" and not isinstance(estimator, StepwiseWeightPerturbation):
        pytest.skip("its weights are made anew, so noise in its layers does not reach them all")
    found = []
    for most in (None, 5):
        model = built(MODELS[name])
        engine = TimeEngine(model, mean_squared_error)
        batch, plan = sequences(), Plan.uniform(4, 4)
        engine.choose(batch)
        step, sizes = model.step, []

        def tight(x: Tensor, state: Any, most: int | None = most, step: Any = step) -> Any:
            if most is not None and len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            sizes.append(len(x))  # noqa: B023
            return step(x, state)

        model.step = tight  # type: ignore[assignment, method-assign]
        oracle = StepOracle(engine, batch)
        key = Key.root(5)
        made, _ = estimator.estimate(oracle, oracle.params, None, key=key, plan=plan)
        found.append((dict(made.grad), made.loss, made.queries))
        assert engine.room.halvings == (0 if most is None else 2)
        assert max(sizes) == (16 if most is None else 4)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_where_blocks_cannot_be_smaller_the_error_stays() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trainer(Tight(0), steps=1, rung="sequential").train()
    room = Room()

    def run() -> None:
        room.of(8)
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        room.retry(run)
    assert room.halvings == 3 and room.of(8) == 1 and room.of(16) == 2


def test_other_errors_are_asked_for_once() -> None:
    room, asked = Room(), 0

    def run() -> None:
        nonlocal asked
        asked += room.of(8)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        room.retry(run)
    assert asked == 8 and room.halvings == 0
