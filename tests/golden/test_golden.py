"""Golden values: what every estimator gave when it was last reviewed, float64 on a CPU.

`pytest tests/golden --rewrite-golden` writes them anew; the difference is to be read like code.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import fwdlearn.estimators
from fwdlearn.allocator import Plan
from fwdlearn.estimator import Estimator
from fwdlearn.keys import Key
from fwdlearn.oracle import ActivationOracle, LossOracle, SlopeOracle, TimeOracle
from fwdlearn.testing import MLP, activation_oracle, loss_oracle, slope_oracle, time_oracle

ORACLES: dict[type, Any] = {
    LossOracle: loss_oracle,
    SlopeOracle: slope_oracle,
    ActivationOracle: activation_oracle,
    TimeOracle: time_oracle,
}
INSTANCES: list[Estimator] = [
    instance
    for name in fwdlearn.estimators.__all__
    for instance in getattr(fwdlearn.estimators, name).examples()
]


def path_of(estimator: Estimator) -> Path:
    """One file an instance: its class, and its place among the examples of the class."""
    alike = [one for one in INSTANCES if type(one) is type(estimator)]
    return Path(__file__).with_name(f"{type(estimator).__name__}-{alike.index(estimator)}.json")


def values_of(estimator: Estimator) -> dict[str, Any]:
    """Gradient, loss, cost and info on a small network, under unequal counts."""
    problem, plan = MLP.random(Key.root(2), 3), Plan(torch.tensor([2, 4, 3]), 2)
    oracle = ORACLES[estimator.traits.needs](problem)
    state = estimator.init(oracle.params)
    estimate, _ = estimator.estimate(oracle, oracle.params, state, key=Key.root(3), plan=plan)
    return {
        "settings": {f.name: getattr(estimator, f.name) for f in fields(cast(Any, estimator))},
        "loss": float(estimate.loss),
        "queries": estimate.queries,
        "info": {name: float(value) for name, value in sorted(estimate.info.items())},
        "grad": {name: estimate.grad[name].flatten().tolist() for name in oracle.params},
    }


@pytest.mark.parametrize("estimator", INSTANCES, ids=repr)
def test_golden(estimator: Estimator, request: pytest.FixtureRequest) -> None:
    # As JSON has them: tuples are lists there.
    values, path = json.loads(json.dumps(values_of(estimator))), path_of(estimator)
    if request.config.getoption("--rewrite-golden"):
        path.write_text(json.dumps(values, indent=1) + "\n")
    assert path.exists(), (
        f"no golden values for {estimator!r}; pytest tests/golden --rewrite-golden"
    )
    golden = json.loads(path.read_text())
    # A new setting may join with a default that changes nothing.
    assert values["settings"].items() >= golden["settings"].items()
    assert values["queries"] == golden["queries"]
    for part in ("info", "grad"):
        now, then = values[part], golden[part]
        assert now.keys() == then.keys()
        for name in then:
            # Libraries may add in another order, which differences over sigma magnify.
            assert now[name] == pytest.approx(then[name], rel=1e-9, abs=1e-9)
    assert values["loss"] == pytest.approx(golden["loss"], rel=1e-12)


def test_no_golden_file_is_left_over() -> None:
    known = {path_of(estimator) for estimator in INSTANCES}
    assert set(Path(__file__).parent.glob("*.json")) == known
