"""What every estimator must keep: all checks, in the order in which reports list them."""

from __future__ import annotations

from fwdlearn.testing import (
    estimator_contract,
    estimator_metamorphic,
    estimator_purity,
    estimator_statistics,
)
from fwdlearn.testing.estimator_case import EstimatorCase
from fwdlearn.testing.report import Suite

# Form before meaning, averages last: a failure is best read after those that may explain it.
GROUPS = (
    "contract",
    "purity",
    "forward only",
    "accounting",
    "metamorphic",
    "errors",
    "statistical",
)

_all = (
    estimator_contract.CHECKS.checks
    | estimator_purity.CHECKS.checks
    | estimator_metamorphic.CHECKS.checks
    | estimator_statistics.CHECKS.checks
)
ESTIMATOR_CHECKS: Suite[EstimatorCase] = Suite(
    dict(sorted(_all.items(), key=lambda item: GROUPS.index(item[1].group)))
)
