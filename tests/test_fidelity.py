"""The benchmark of fidelity: what is exact scores as exact, and every registered name is in it."""

from __future__ import annotations

import pytest

from benchmarks.fidelity import ROWS, average, estimators, work
from fwdlearn.baselines import Backpropagation, ReverseOracle
from fwdlearn.estimators import RandomPerturbation
from fwdlearn.oracle import TimeOracle
from fwdlearn.registry import entries, load


def test_the_gradient_itself_is_perfect_and_an_estimate_is_not() -> None:
    at = work("MLP", trained=False)
    exact = [ReverseOracle(at.engine, at.batch(number)).gradient()[0] for number in range(2)]
    perfect = average(at, Backpropagation(), 1, exact)
    assert perfect["cosine"] == pytest.approx(1) and perfect["share"] == pytest.approx(1)
    assert perfect["queries_per_row"] == 3
    few, many = (average(at, RandomPerturbation(), count, exact) for count in (2, 128))
    assert 0 < few["cosine"] < many["cosine"] < 1
    assert many["queries_per_row"] == 129 and ROWS == 64


def test_every_registered_estimator_is_measured() -> None:
    labels = {label.partition(",")[0] for label, _ in estimators()}
    # Those of recurrent networks have a benchmark of their own.
    assert labels == {
        name
        for name, entry in entries("estimator").items()
        if load(entry.target)().traits.needs is not TimeOracle
    }
