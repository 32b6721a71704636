"""Closed-form facts of node perturbation; the rest is in the conformance suite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fwdlearn import noise as noise_module
from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator
from fwdlearn.estimators import (
    ActivityNodePerturbation,
    IterativeNodePerturbation,
    LikelihoodRatio,
    NodePerturbation,
)
from fwdlearn.keys import Key
from fwdlearn.noise import SiteNoise
from fwdlearn.oracle import ModelOracle
from fwdlearn.testing.estimator_statistics import mean_figure

KEY = Key.root(4)


def network(*parts: nn.Module, rows: int = 3, inputs: int = 3) -> ModelOracle:
    """A network with a linear loss of its outputs, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(*parts).double()
        for value in model.parameters():
            value.data.normal_(0, 0.7)
        x = torch.randn(rows, inputs).double()
        targets = torch.randn(rows, 2).double()
    engine = Engine(model, lambda output, targets: (output * targets).sum(1))
    return ModelOracle(engine, Batch((x,), targets))


def ask(estimator: Estimator, oracle: ModelOracle, plan: Plan, key: Key = KEY) -> Estimate:
    return estimator.estimate(oracle, oracle.params, None, key=key, plan=plan)[0]


def first_order(oracle: ModelOracle) -> dict[str, Tensor]:
    """The exact gradient, by autograd."""
    batch, model = oracle._batch, oracle._engine.model
    params = dict(model.named_parameters())
    loss = oracle._engine.objective(model(*batch.args), batch.targets).mean()
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def test_np_is_its_formula() -> None:
    sigma, plan = 0.05, Plan(torch.tensor([2, 4, 3]))
    oracle = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    estimate = ask(NodePerturbation(sigma), oracle, plan)
    first, last = oracle._engine.model[0], oracle._engine.model[2]
    x, targets = oracle._batch.args[0], oracle._batch.targets
    noise = SiteNoise(KEY, oracle.sites, plan.directions)
    expected = {name: torch.zeros_like(value) for name, value in oracle.params.items()}
    with torch.no_grad():
        for row, number, weight in zip(plan.row, plan.direction, plan.weight, strict=True):
            z = [noise.dense(site, number[None])[0] for site in oracle.sites]
            inner = first(x[row])
            after = last((inner + sigma * z[0]).tanh()) + sigma * z[1]
            factor = weight * ((after - last(inner.tanh())) @ targets[row]) / sigma
            for layer, own, below in (("0", z[0], x[row]), ("2", z[1], inner.tanh())):
                expected[f"{layer}.weight"] += factor * own.outer(below)
                expected[f"{layer}.bias"] += factor * own
    for name, value in expected.items():
        torch.testing.assert_close(estimate.grad[name], value, rtol=1e-9, atol=1e-12)


def test_inp_gives_each_layer_its_passes() -> None:
    """With one output a layer a sign squared is one: as many passes as layers give the gradient of
    a linear loss exactly, and a layer's estimate owes nothing to the noise of another."""
    oracle = network(nn.Linear(3, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    oracle._engine.objective = lambda output, targets: output[:, 0] * targets[:, 0]
    estimate = ask(IterativeNodePerturbation(), oracle, Plan.uniform(3, 3))
    for name, value in first_order(oracle).items():
        torch.testing.assert_close(estimate.grad[name], value, rtol=1e-9, atol=1e-12)
    # All layers at once disturb each other.
    both = ask(NodePerturbation(), oracle, Plan.uniform(3, 3))
    assert (both.grad["0.weight"] - first_order(oracle)["0.weight"]).norm() > 1e-3


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_inp_is_unbiased_however_few_passes_there_are(directions: int) -> None:
    """Fewer passes than layers, and a number that they do not divide."""
    oracle = network(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    exact = torch.cat([g.flatten() for g in first_order(oracle).values()])
    names = list(first_order(oracle))
    estimates = []
    for seed in range(300):
        plan = Plan.uniform(3, directions)
        made = ask(IterativeNodePerturbation(1e-4), oracle, plan, Key.root(seed))
        estimates.append(torch.cat([made.grad[name].flatten() for name in names]))
    figure = mean_figure(torch.stack(estimates), exact)
    assert figure.holds, str(figure)


def test_anp_is_its_formula() -> None:
    """Against loops over queries and layers, with rows of unequal counts."""
    sigma, plan = 0.05, Plan(torch.tensor([2, 4, 3]))
    oracle = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    estimate = ask(ActivityNodePerturbation(sigma), oracle, plan)
    first, last = oracle._engine.model[0], oracle._engine.model[2]
    x, targets = oracle._batch.args[0], oracle._batch.targets
    noise = SiteNoise(KEY, oracle.sites, plan.directions)
    expected = {name: torch.zeros_like(value) for name, value in oracle.params.items()}
    with torch.no_grad():
        for row, number, weight in zip(plan.row, plan.direction, plan.weight, strict=True):
            z = [noise.dense(site, number[None])[0] for site in oracle.sites]
            clean = first(x[row])
            hidden = clean + sigma * z[0]
            before, after = last(clean.tanh()), last(hidden.tanh()) + sigma * z[1]
            changes = hidden - clean, after - before
            square = sum(change.square().sum() for change in changes)
            factor = weight * 6 * ((after - before) @ targets[row]) / square
            for layer, change, below in (
                ("0", changes[0], x[row]),
                ("2", changes[1], clean.tanh()),
            ):
                expected[f"{layer}.weight"] += factor * change.outer(below)
                expected[f"{layer}.bias"] += factor * change
    for name, value in expected.items():
        torch.testing.assert_close(estimate.grad[name], value, rtol=1e-9, atol=1e-12)
    assert estimate.queries == 3 + 9


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_anp_of_one_layer_is_unbiased(law: str) -> None:
    """E[v v^T / |v|^2] = 1 / N: with the factor N, not its root, the mean is the gradient."""
    oracle = network(nn.Linear(3, 2))
    x, targets = oracle._batch.args[0], oracle._batch.targets
    estimates = [
        ask(ActivityNodePerturbation(0.1, law), oracle, Plan.uniform(3, 1), Key.root(seed))
        for seed in range(400)
    ]
    grads = torch.stack([e.grad["0.weight"].flatten() for e in estimates])
    figure = mean_figure(grads, (targets.T @ x / 3).flatten())
    assert figure.holds, str(figure)


def test_anp_is_the_gradient_times_the_covariance_of_activity() -> None:
    """Two linear layers with orthogonal weights, so that |da|^2 depends on the noise through its
    own layers alone; the mean of the deeper layer is its covariance times the gradient."""
    oracle = network(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), rows=1, inputs=2)
    turn = math.sqrt(0.5) * torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    for layer in oracle._engine.model:
        layer.weight.data.copy_(turn)
    x, target = oracle._batch.args[0][0], oracle._batch.targets[0]
    # All sixteen patterns of signs.
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double()
    z1, z2 = signs[:, :2], signs[:, 2:]
    deep = z2 + z1 @ turn.T
    square = z1.square().sum(1) + deep.square().sum(1)
    mean = (4 * (deep @ target) / square).unsqueeze(1) * deep
    exact = mean.mean(0).outer(turn @ x)
    estimates = [
        ask(ActivityNodePerturbation(0.1), oracle, Plan.uniform(1, 4), Key.root(seed))
        for seed in range(400)
    ]
    figure = mean_figure(
        torch.stack([e.grad["1.weight"].flatten() for e in estimates]), exact.flatten()
    )
    assert figure.holds, str(figure)
    # The direction is that of the gradient, as covariance and identity are the same here; the
    # length is not: deeper layers move more.
    gradient = target.outer(turn @ x)
    torch.testing.assert_close(exact / exact.norm(), gradient / gradient.norm())
    assert float(exact.norm() / gradient.norm()) > 1.1


def test_anp_drops_what_is_not_finite() -> None:
    oracle = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    objective = oracle._engine.objective

    def spoiled(output: Tensor, targets: Tensor) -> Tensor:
        losses = objective(output, targets)
        return losses.masked_fill(torch.arange(len(losses)) == 5, float("nan"))

    plan = Plan.uniform(3, 4)
    whole = ask(ActivityNodePerturbation(), oracle, plan)
    oracle._engine.objective = spoiled
    some = ask(ActivityNodePerturbation(), oracle, plan)
    assert int(some.info["nonfinite"]) == 1 and int(whole.info["nonfinite"]) == 0
    assert all(value.isfinite().all() for value in some.grad.values())
    assert not torch.equal(some.grad["0.weight"], whole.grad["0.weight"])


def test_memory_of_anp_does_not_grow_with_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the noisy passes take the same memory, but for a few numbers a query."""
    monkeypatch.setattr(noise_module, "_KEEP_BYTES", 0)
    layers = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.ReLU())]
    oracle = network(*layers, nn.Linear(64, 2), inputs=64)
    engine = Engine(oracle._engine.model, oracle._engine.objective, memory_budget=300_000)
    oracle = ModelOracle(engine, oracle._batch)
    peaks = []
    for directions in (100, 1000):
        plan = Plan.uniform(3, directions)
        ask(ActivityNodePerturbation(), oracle, plan)
        with LiveBytes(torch.device("cpu")) as live:
            ask(ActivityNodePerturbation(), oracle, plan)
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] < 2700 * 160
    # What the queries' activations would take, all at once.
    assert peaks[1] < 0.2 * 3000 * 194 * 8


def test_mistakes_are_named() -> None:
    for kind in (NodePerturbation, IterativeNodePerturbation, ActivityNodePerturbation):
        with pytest.raises(ValueError, match=rf"{kind.__name__}\(sigma=...\) must be positive"):
            kind(sigma=0)
        with pytest.raises(ValueError, match=rf"{kind.__name__}\(law=...\) must be one of"):
            kind(law="laplace")

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * torch.cumsum(self.gain, 0)

    oracle = network(Unused())
    for kind in (NodePerturbation, ActivityNodePerturbation):
        with pytest.raises(UsageError, match="has no gradient of 0.gain: .* perturbs weights"):
            ask(kind(), oracle, Plan.uniform(3, 1))


def test_np_is_the_likelihood_ratio_at_its_plainest() -> None:
    """The same noise and the same clean baseline: equal where all layers put out the same size."""
    oracle = network(nn.Linear(3, 2), rows=1)
    plan, size = Plan.uniform(1, 4), float(oracle.clean().rms["0.weight"])
    ratio = LikelihoodRatio(0.1, exact_head=False, balance=False)
    one = ratio.estimate(oracle, oracle.params, ratio.init(oracle.params), key=KEY, plan=plan)[0]
    other = ask(NodePerturbation(0.1 * size), oracle, plan)
    for name in oracle.params:
        torch.testing.assert_close(one.grad[name], other.grad[name], rtol=1e-9, atol=1e-12)
