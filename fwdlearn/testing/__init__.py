"""Checks for estimators and allocators of anyone, and problems with known gradients.

`check_estimator(MyEstimator)` returns a report; none of this needs pytest.
"""

from __future__ import annotations

from fwdlearn.testing.conformance import (
    check,
    check_allocator,
    check_estimator,
    parametrize_with_checks,
)
from fwdlearn.testing.oracles import (
    ActivationFunctionOracle,
    Asked,
    FunctionOracle,
    SlopeFunctionOracle,
    TimeFunctionOracle,
    activation_oracle,
    loss_oracle,
    slope_oracle,
    time_oracle,
)
from fwdlearn.testing.problems import MLP, Linear, Logistic, Problem, Quadratic
from fwdlearn.testing.report import Figure, Report, Result

__all__ = [
    "MLP",
    "ActivationFunctionOracle",
    "Asked",
    "Figure",
    "FunctionOracle",
    "Linear",
    "Logistic",
    "Problem",
    "Quadratic",
    "Report",
    "Result",
    "SlopeFunctionOracle",
    "TimeFunctionOracle",
    "activation_oracle",
    "check",
    "check_allocator",
    "check_estimator",
    "loss_oracle",
    "parametrize_with_checks",
    "slope_oracle",
    "time_oracle",
]
