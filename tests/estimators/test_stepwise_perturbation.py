"""What the published rules estimate: no gradient through time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.errors import UsageError
from fwdlearn.estimators import (
    CausalNodePerturbation,
    StepwiseActivityPerturbation,
    StepwiseWeightPerturbation,
)
from fwdlearn.models.decorrelation import decorrelated
from fwdlearn.noise import SiteNoise
from fwdlearn.objectives import mean_squared_error
from fwdlearn.step_oracle import StepOracle

from ..engine.steps import MODELS, Mixing, built, sequences
from .test_causal_node_perturbation import KEY, RECURRENT, ask, cosine, exact, oracle


def test_weights_drawn_anew_follow_one_step() -> None:
    """160,000 passes of a small net: cosine at least 0.99 with the truncated gradient.

    So many make about 0.996 of it; the gradient through all steps is another.
    """
    made = oracle(steps=8, units=5)
    wanted, other = exact(made, truncated=True), exact(made)
    assert cosine(wanted, other, RECURRENT) < 0.95
    found = ask(StepwiseWeightPerturbation(1e-3), made, Plan.uniform(1, 160_000)).grad
    names = list(wanted)
    assert cosine(found, wanted, names) >= 0.99 > cosine(found, other, names)


def test_activity_is_its_formula() -> None:
    sigma, plan = 0.05, Plan(torch.tensor([2, 1, 3]))
    made = oracle(rows=3, steps=4, units=3)
    sites, total = made.step_sites, dict[str, Tensor]()

    def noise(step: int) -> SiteNoise:
        return SiteNoise(KEY.fold(step), sites, plan.directions)

    for m in made.moments(plan.row, noise, plan.direction, sigma, shifts=True):
        change = plan.weight * (m.losses - m.clean[plan.row])
        units = sum(math.prod(site.shape) for site in sites.values())
        square = sum(shift.square().flatten(1).sum(1) for shift in m.shifts.values())
        cotangents = {}
        for site, shift in m.shifts.items():
            each = (units * change / square).unsqueeze(1) * shift
            zero = torch.zeros(3, *shift.shape[1:], dtype=torch.float64)
            cotangents[site] = zero.index_add_(0, plan.row, each)
        for name, value in m.gather(cotangents).items():
            total[name] = total.get(name, 0) + value
    found = ask(StepwiseActivityPerturbation(sigma), made, plan).grad
    torch.testing.assert_close({name: found[name] for name in total}, total)


def test_weights_of_a_step_are_those_of_a_copy() -> None:
    """The state goes from step to step, each under weights of its own."""
    made = oracle(rows=2, steps=3, units=4)
    row, number, sigma = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), 0.3
    model, x = made._engine.model, made._batch.args[0]
    plain = {name: value.detach().clone() for name, value in model.named_parameters()}

    def family(step: int) -> Directions:
        return Directions(KEY.fold(step), made.params, 3)

    found = torch.stack([m.losses for m in made.moments(row, family, number, sigma)])
    for query in range(3):
        state = model.initial(1)
        for step in range(3):
            with torch.no_grad():
                for name, value in model.named_parameters():
                    delta = family(step).dense(name, number[query : query + 1])[0]
                    value.copy_(plain[name] + sigma * delta)
                y, state = model.step(x[row[query], step].unsqueeze(0), state)
                for name, value in model.named_parameters():
                    value.copy_(plain[name])
            target = made._batch.targets[row[query], step].unsqueeze(0)
            loss = mean_squared_error(y, target)[0] / 3
            assert float(found[step, query]) == pytest.approx(float(loss))


@pytest.mark.parametrize(
    "estimator",
    [
        CausalNodePerturbation(),
        StepwiseActivityPerturbation(),
        StepwiseWeightPerturbation(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_decorrelated_inputs_change_nothing_but_the_network(estimator: object) -> None:
    """DNP, DANP and DWP: the same rules on a network whose inputs have been decorrelated."""
    model, batch = built(MODELS["elman"]).float(), sequences(dtype=torch.float32)
    other = decorrelated(model)
    plan = Plan.uniform(4, 2)
    one = StepOracle(TimeEngine(model, mean_squared_error), batch)
    two = StepOracle(TimeEngine(other, mean_squared_error), batch)
    grads = [
        {n.replace("layer.", ""): ask(estimator, made, plan).grad[n] for n in made.params}  # type: ignore[arg-type]
        for made in (one, two)
    ]
    assert grads[0].keys() == grads[1].keys()
    assert all(value.isfinite().all() for value in grads[1].values())


def test_a_model_that_cannot_be_folded_is_refused() -> None:
    made = StepOracle(TimeEngine(built(Mixing), mean_squared_error), sequences())
    with pytest.raises(UsageError, match="need the fold, and Mixing runs on the rung sequential"):
        ask(StepwiseWeightPerturbation(), made, Plan.uniform(4, 1))
    for kind in (StepwiseActivityPerturbation, StepwiseWeightPerturbation):
        with pytest.raises(ValueError, match=f"{kind.__name__}.sigma"):
            kind(sigma=0.0)
