"""What credit through time is worth: the gradients of backpropagation, and the published one's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator
from fwdlearn.estimators import (
    SPSA,
    CausalNodePerturbation,
    ForwardGradient,
    PerturbationThroughTime,
)
from fwdlearn.keys import Key
from fwdlearn.models.recurrent import Recurrent
from fwdlearn.noise import SiteNoise
from fwdlearn.objectives import mean_squared_error
from fwdlearn.step_oracle import StepOracle

from ..engine.steps import MODELS, built, numbers, sequences

KEY = Key.root(4)


def oracle(rows: int = 1, steps: int = 20, units: int = 16) -> StepOracle:
    """Sixteen units and twenty steps, of which the state remembers several."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Recurrent("elman", 4, (units,), 4, bias=False).double()
        nn.init.normal_(model.cells[0].recurrent.weight, std=units**-0.5)
    batch = Batch((numbers("in", rows, steps, 4) * 2,), numbers("out", rows, steps, 4))
    return StepOracle(TimeEngine(model, mean_squared_error), batch)


def exact(oracle: StepOracle, truncated: bool = False) -> dict[str, Tensor]:
    """The gradient by autograd, of the net as it is or with states that come from nowhere."""
    model, batch = oracle._engine.model, oracle._batch
    state, out = model.initial(len(batch)), []
    for x in batch.args[0].unbind(1):
        y, state = model.step(x, {n: s.detach() if truncated else s for n, s in state.items()})
        out.append(y)
    loss = mean_squared_error(torch.stack(out, 1), batch.targets).mean()
    params = dict(model.named_parameters())
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def ask(estimator: Estimator, oracle: StepOracle, plan: Plan, key: Key = KEY) -> Estimate:
    state = estimator.init(oracle.params)
    return estimator.estimate(oracle, oracle.params, state, key=key, plan=plan)[0]


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: list[str]) -> float:
    a, b = (torch.cat([value[name].flatten() for name in names]) for value in (one, other))
    return float(a @ b / (a.norm() * b.norm()))


WHOLE = ["cells.0.input.weight", "cells.0.recurrent.weight", "head.weight"]
RECURRENT = ["cells.0.recurrent.weight"]


@pytest.mark.parametrize(
    ("estimator", "truncated", "passes"),
    [
        (CausalNodePerturbation(1e-3), False, 32_000),
        (CausalNodePerturbation(1e-3, horizon=0, exact_head=False), True, 16_000),
        (SPSA(1e-3), False, 120_000),
    ],
    ids=["causal", "published", "static-weights"],
)
def test_the_mean_is_the_gradient_that_it_ought_to_be(
    estimator: Estimator, truncated: bool, passes: int
) -> None:
    """Recurrent weights of 16 units, 20 steps: cosine at least 0.99 with that of autograd.

    So many passes of one row make about 0.995 of it, with a standard deviation over keys of 0.001;
    the gradient through all steps and that truncated after one have a cosine of 0.69.
    """
    made = oracle()
    wanted, other = exact(made, truncated), exact(made, not truncated)
    assert cosine(wanted, other, RECURRENT) < 0.8
    found = ask(estimator, made, Plan.uniform(1, passes)).grad
    assert cosine(found, wanted, RECURRENT) >= 0.99
    assert cosine(found, wanted, WHOLE) >= 0.99
    square = sum(float(value.square().sum()) for value in wanted.values())
    along = sum(float((found[name] * value).sum()) for name, value in wanted.items())
    assert abs(along / square - 1) < 0.05


def test_forward_mode_through_time_is_the_limit_of_static_weights() -> None:
    """The same directions, with noise that goes to nothing and without."""
    made, plan = oracle(rows=3), Plan.uniform(3, 8)
    exactly, nearly = ask(ForwardGradient(), made, plan), ask(SPSA(1e-5), made, plan)
    for name, value in exactly.grad.items():
        torch.testing.assert_close(value, nearly.grad[name], rtol=1e-4, atol=1e-6)


def test_credit_is_its_formula() -> None:
    """One pass of one row, put together from the losses of its steps."""
    sigma, made = 0.1, oracle(rows=2, steps=5, units=3)
    sites = made.step_sites

    def noise(step: int) -> SiteNoise:
        return SiteNoise(KEY.fold(step), sites, 4)

    plan = Plan(torch.tensor([1, 3]))
    moments = list(made.moments(plan.row, noise, plan.direction, sigma))
    changes = torch.stack([m.losses - m.clean[plan.row] for m in moments])
    for horizon, discount in ((None, 1.0), (2, 0.7), (0, 1.0), (9, 0.5)):
        wanted: dict[str, Tensor] = {}
        for t, moment in enumerate(moments):
            later = range(t, 5 if horizon is None else min(5, t + horizon + 1))
            credit = sum(discount ** (s - t) * changes[s] for s in later) * plan.weight / sigma
            cotangents = {}
            for site in sites:
                each = noise(t).dense(site, plan.direction) * credit.unsqueeze(1)
                zero = torch.zeros(2, each.shape[1], dtype=torch.float64)
                cotangents[site] = zero.index_add_(0, plan.row, each)
            for name, value in moment.gather(cotangents).items():
                wanted[name] = wanted.get(name, 0) + value
        estimator = CausalNodePerturbation(
            sigma, horizon=horizon, discount=discount, exact_head=False
        )
        found = ask(estimator, made, plan).grad
        torch.testing.assert_close({name: found[name] for name in wanted}, wanted)


def test_a_discount_alone_has_a_horizon_of_its_own() -> None:
    made, plan = oracle(rows=2, steps=9, units=3), Plan.uniform(2, 3)
    alone = ask(CausalNodePerturbation(discount=0.5), made, plan)
    given = ask(CausalNodePerturbation(discount=0.5, horizon=10), made, plan)
    for name, value in alone.grad.items():
        torch.testing.assert_close(value, given.grad[name])
    assert (alone.queries, given.queries) == (2 * 4, 2 * 4)
    assert ask(CausalNodePerturbation(), made, plan).queries == 2 * 5


@pytest.mark.parametrize("name", ["gru", "lstm", "minimal", "feedback"])
def test_every_cell_points_where_the_gradient_does(name: str) -> None:
    """2,000 passes a row: an inner product within a tenth of the squared norm."""
    model, batch = built(MODELS[name]), sequences()
    made = StepOracle(TimeEngine(model, mean_squared_error), batch)
    wanted = exact(made)
    found = ask(CausalNodePerturbation(1e-3), made, Plan.uniform(4, 2000)).grad
    inner = sum(float((found[name] * value).sum()) for name, value in wanted.items())
    square = sum(float(value.square().sum()) for value in wanted.values())
    assert abs(inner / square - 1) < 0.1


def test_the_head_is_exact() -> None:
    made = oracle(rows=3, steps=6)
    found = ask(CausalNodePerturbation(), made, Plan.uniform(3, 1)).grad["head.weight"]
    torch.testing.assert_close(found, exact(made)["head.weight"])


def test_a_query_that_is_not_finite_goes_and_the_rest_is_as_without_it() -> None:
    model, batch = built(MODELS["gru"]), sequences()

    def objective(output: Tensor, targets: Tensor) -> Tensor:
        losses = mean_squared_error(output, targets)
        return losses.where(losses < 1e3, math.inf)

    made = StepOracle(TimeEngine(model, objective), batch)
    batch.targets[1, 4] = 1e6
    found = ask(CausalNodePerturbation(horizon=2), made, Plan.uniform(4, 3))
    assert int(found.info["nonfinite"]) == 3
    assert all(value.isfinite().all() for value in found.grad.values())


def test_errors_say_what_to_do() -> None:
    made = StepOracle(TimeEngine(built(MODELS["learned"]), mean_squared_error), sequences())
    with pytest.raises(UsageError, match="no gradient of start: the initial state is made of it"):
        ask(CausalNodePerturbation(), made, Plan.uniform(4, 1))
    for settings in ({"sigma": 0}, {"horizon": -1}, {"discount": 0}, {"discount": 1.5}):
        with pytest.raises(ValueError, match="CausalNodePerturbation"):
            CausalNodePerturbation(**settings)  # type: ignore[arg-type]


def test_noise_goes_where_it_has_fewer_numbers() -> None:
    """Weights: 4 units have 32 of them. Outputs: of two layers of 4 units, at every step."""
    for steps, sharing, on_weights in ((3, 1, False), (4, 1, False), (5, 1, True), (5, 2, False)):
        made = oracle(rows=2, steps=steps, units=4)
        plan = Plan(torch.tensor([2, 3]), sharing)
        found = ask(PerturbationThroughTime(), made, plan)
        told = {name: float(value) for name, value in found.info.items()}
        assert told["on_weights"] == on_weights
        assert (told["weight_numbers"], told["layer_numbers"]) == (32 * sharing, 8 * steps)
        assert found.queries == PerturbationThroughTime().traits.queries(plan)
        kind = "weights" if on_weights else "layers"
        counts = plan.counts + int(on_weights)
        same = ask(PerturbationThroughTime(noise=kind), made, Plan(counts, sharing))
        for name in made.params:
            assert torch.equal(found.grad[name], same.grad[name])


def test_noise_on_weights_leaves_the_readout_exact() -> None:
    made = oracle(steps=8, units=5)
    wanted, plan = exact(made), Plan.uniform(1, 20_000)
    found = ask(PerturbationThroughTime(noise="weights"), made, plan).grad
    torch.testing.assert_close(found["head.weight"], wanted["head.weight"])
    names = ["cells.0.input.weight", "cells.0.recurrent.weight"]
    assert cosine(found, wanted, names) >= 0.99


def test_what_no_layer_feeds_can_have_noise_itself() -> None:
    made = StepOracle(TimeEngine(built(MODELS["learned"]), mean_squared_error), sequences())
    found = ask(PerturbationThroughTime(noise="weights"), made, Plan.uniform(4, 500)).grad
    wanted = exact(made)
    assert cosine(found, wanted, list(wanted)) > 0.95
