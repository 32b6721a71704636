"""LikelihoodRatio: what its estimates must be on networks whose gradients are known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.balance import Balance
from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate
from fwdlearn.estimators import LikelihoodRatio
from fwdlearn.keys import Key
from fwdlearn.noise import Noise
from fwdlearn.objectives import cross_entropy, zero_one
from fwdlearn.oracle import ModelOracle
from fwdlearn.testing.estimator_statistics import z_limit

KEY = Key.root(1)


class Attention(nn.Module):
    """A pre-norm block of one head with a convolution in front, as a vision transformer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.project = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.project(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return self.head(x.mean(1))


def convolutional(**settings: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, **settings),
        nn.Tanh(),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "strided": (lambda: convolutional(stride=2, padding=1), (2, 6, 6)),
    "dilated": (lambda: convolutional(dilation=2, padding="same"), (2, 5, 5)),
    "grouped": (lambda: convolutional(groups=2, stride=(1, 2)), (2, 5, 6)),
    "attention": (Attention, (1, 6, 6)),
}


def made(name: str, rows: int = 3) -> tuple[nn.Module, Batch]:
    make, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double()
        batch = Batch((torch.randn(rows, *shape).double(),), torch.arange(rows) % 3)
        with torch.no_grad():
            model(*batch.args)
        for value in model.parameters():
            nn.init.normal_(value, std=0.5)
    return model, batch


def exact(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    loss = cross_entropy(model(*batch.args), batch.targets).mean()
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def ask(
    estimator: LikelihoodRatio,
    model: nn.Module,
    batch: Batch,
    plan: Plan,
    objective: Any = cross_entropy,
    key: Key = KEY,
    state: Balance | None = None,
) -> Estimate:
    oracle = ModelOracle(Engine(model, objective), batch)
    state = estimator.init(oracle.params) if state is None else state
    estimate, _ = estimator.estimate(oracle, oracle.params, state, key=key, plan=plan)
    assert estimate.queries == oracle.queries
    return estimate


def flat(gradient: Any, names: Any) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in names])


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(
    "estimator",
    [
        LikelihoodRatio(1e-4),
        LikelihoodRatio(1e-4, baseline="antithetic", law="laplace", exact_head=False, blocks=2),
        LikelihoodRatio(1e-4, noise="hybrid", weights=("0.*", "embed.*"), exact_head=False),
    ],
    ids=["default", "pairs", "hybrid"],
)
def test_many_copies_give_the_gradient(name: str, estimator: LikelihoodRatio) -> None:
    """The error is as large as the estimate says, and no bias is left: 1,000 copies of each row, at
    three times the mean square and five standard errors of the projection on the gradient."""
    model, batch = made(name)
    gradient = exact(model, batch)
    # Rows that are alike, since the sums of many rows are quick.
    many = batch.select(torch.arange(60) % 3)
    estimate = ask(estimator, model, many, Plan.uniform(60, 50))
    truth, found = flat(gradient, gradient), flat(estimate.grad, gradient)
    variance = float(estimate.info["variance"])
    assert float((found - truth).square().sum()) < 3 * variance
    along = float((found - truth) @ truth / truth.norm())
    assert abs(along) < 5 * math.sqrt(variance)
    # The variance is small enough for this to mean something.
    assert variance < float(truth.square().sum())


def test_of_a_linear_model_the_gradient_is_exact() -> None:
    """Nothing but a head: no noise, no query beside the clean pass."""
    model = nn.Linear(4, 3).double()
    batch = Batch((torch.randn(5, 4).double(),), torch.arange(5) % 3)
    estimate = ask(LikelihoodRatio(), model, batch, Plan.uniform(5, 2))
    gradient = exact(model, batch)
    for name, value in gradient.items():
        torch.testing.assert_close(estimate.grad[name], value)
    assert estimate.queries == 5


def test_expectation_on_a_linear_model_is_a_sum_over_signs() -> None:
    """Three outputs: eight patterns of signs, so the mean needs no tolerance for chance."""
    model = nn.Linear(2, 3).double()
    x, target, sigma = torch.randn(1, 2).double(), torch.tensor([1]), 0.7
    logits = model(x).detach()
    size = sigma * logits.square().mean().sqrt()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
    losses = cross_entropy(logits + size * signs, target.expand(8))
    expected = (losses.unsqueeze(1) * signs).mean(0) / size
    estimator, copies = LikelihoodRatio(sigma, exact_head=False), 20_000
    many = Batch((x,), target).select(torch.zeros(200, dtype=torch.int64))
    estimate = ask(estimator, model, many, Plan.uniform(200, copies // 200))
    # No entry of an estimate is further from the mean than all of its second moment allows.
    slopes = (losses - cross_entropy(logits, target)).abs().max() / size
    error = float(slopes) / math.sqrt(copies)
    limit = z_limit(3, copies) * error
    assert bool(((estimate.grad["bias"] - expected).abs() < limit).all())
    outer = estimate.grad["bias"].unsqueeze(1) * x
    torch.testing.assert_close(estimate.grad["weight"], outer)


def test_the_exact_head_is_softmax_minus_target() -> None:
    model, batch = made("linear", rows=4)
    estimate = ask(LikelihoodRatio(), model, batch, Plan.uniform(4, 1))
    gradient = exact(model, batch)
    for name in ("2.weight", "2.bias"):
        torch.testing.assert_close(estimate.grad[name], gradient[name])
    assert not torch.allclose(estimate.grad["0.weight"], gradient["0.weight"])


def test_a_loss_without_slopes_gets_noise_at_the_head_too() -> None:
    """0-1 loss: the mean is the gradient of the probability of an error under the noise."""
    model = nn.Linear(2, 2).double()
    batch = Batch((torch.randn(1, 2).double(),), torch.tensor([0]))
    logits, sigma, copies = model(*batch.args).detach()[0], 1.0, 40_000
    size = float(sigma * logits.square().mean().sqrt())
    estimator = LikelihoodRatio(sigma, law="gaussian", baseline="leave-one-out", balance=False)
    many = batch.select(torch.zeros(200, dtype=torch.int64))
    estimate = ask(estimator, model, many, Plan.uniform(200, copies // 200), zero_one)
    # P(error) = Phi((a1 - a0) / (size sqrt 2)).
    margin = float(logits[1] - logits[0]) / (size * math.sqrt(2))
    density = math.exp(-(margin**2) / 2) / math.sqrt(2 * math.pi) / (size * math.sqrt(2))
    expected = torch.tensor([-density, density]).double()
    limit = z_limit(2, copies) * 0.5 / (size * math.sqrt(copies))
    assert bool(((estimate.grad["bias"] - expected).abs() < limit).all())
    assert limit < density


class Mispaired:
    """An oracle that gives the second half of a pair to another row."""

    def __init__(self, oracle: ModelOracle) -> None:
        self.oracle = oracle

    def __getattr__(self, name: str) -> Any:
        return getattr(self.oracle, name)

    def noisy_losses(self, row: Tensor, noise: Noise, index: Tensor, scale: Tensor) -> Tensor:
        row = torch.where(scale < 0, (row + 1) % self.oracle.rows, row)
        return self.oracle.noisy_losses(row, noise, index, scale)


def test_pairs_are_pairs() -> None:
    """Partners are of one row, adjacent, and share the noise; mispaired ones lose the gradient."""
    model, batch = made("linear", rows=8)
    estimator = LikelihoodRatio(0.01, baseline="antithetic", exact_head=False)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Watched(Mispaired):
        def noisy_losses(self, row: Tensor, noise: Noise, index: Tensor, scale: Tensor) -> Tensor:
            seen.append((row, index, scale))
            return self.oracle.noisy_losses(row, noise, index, scale)

    gradient, plan, cosines = exact(model, batch), Plan(torch.tensor([30, 40] * 4)), []
    for kind in (Watched, Mispaired):
        oracle = ModelOracle(Engine(model, cross_entropy), batch)
        estimate, _ = estimator.estimate(
            kind(oracle),  # type: ignore[arg-type]
            oracle.params,
            estimator.init(oracle.params),
            key=KEY,
            plan=plan,
        )
        pair = flat(estimate.grad, gradient), flat(gradient, gradient)
        cosines.append(float(torch.cosine_similarity(*pair, dim=0)))
    row, index, scale = seen[0]
    for one in (row, index):
        assert torch.equal(one[0::2], one[1::2])
    assert torch.equal(scale[0::2], -scale[1::2])
    assert cosines[0] > 0.8 and cosines[1] < 0.3 * cosines[0], cosines


def test_noise_in_one_layer_does_not_disturb_the_next() -> None:
    """Clean inputs in the product: pairs need no baseline, however large the losses are."""
    model, batch = made("linear", rows=4)
    estimator = LikelihoodRatio(0.01, baseline="antithetic", exact_head=False)

    def shifted(output: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(output, targets) + 1000

    plan = Plan.uniform(4, 8)
    one, other = (ask(estimator, model, batch, plan, loss) for loss in (cross_entropy, shifted))
    for name in one.grad:
        torch.testing.assert_close(one.grad[name], other.grad[name], rtol=1e-6, atol=1e-6)


def test_quasi_random_points_estimate_better_in_few_dimensions() -> None:
    """Four noisy numbers, 64 copies: less than half the squared error of random normal numbers."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = Batch((torch.randn(2, 3).double(),), torch.tensor([0, 2]))
    gradient, errors = exact(model, batch), {}
    for law in ("gaussian", "sobol"):
        estimator, total = LikelihoodRatio(1e-3, law=law), 0.0
        for number in range(20):
            estimate = ask(estimator, model, batch, Plan.uniform(2, 64), key=Key.root(number))
            total += sum(float((estimate.grad[n] - g).square().sum()) for n, g in gradient.items())
        errors[law] = total
    assert errors["sobol"] < 0.5 * errors["gaussian"]


def test_orthogonal_directions_of_a_full_set_are_exact() -> None:
    """Four noisy numbers, four directions: nothing is left but what sigma does; with two of them
    two thirds of what independent ones leave: 1 and 1.5 times the derivative."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = Batch((torch.randn(2, 3).double(),), torch.tensor([0, 2]))
    gradient, errors = exact(model, batch), {}
    estimate = ask(LikelihoodRatio(1e-6, law="orthogonal"), model, batch, Plan.uniform(2, 4))
    for name, value in gradient.items():
        torch.testing.assert_close(estimate.grad[name], value, rtol=1e-4, atol=1e-5)
    for law in ("rademacher", "orthogonal"):
        estimator, total = LikelihoodRatio(1e-6, law=law), 0.0
        for number in range(400):
            estimate = ask(estimator, model, batch, Plan.uniform(2, 2), key=Key.root(number))
            total += sum(float((estimate.grad[n] - g).square().sum()) for n, g in gradient.items())
        errors[law] = total
    # Two thirds expected; the standard error of the ratio is about 0.05.
    assert errors["orthogonal"] < 0.85 * errors["rademacher"]


@pytest.mark.parametrize("copies", [2, 3, 8])
def test_orthogonal_directions_know_their_variance(copies: int) -> None:
    """Reported against measured over 600 estimates, whose standard error is some 6 %; eight
    directions of seven numbers leave none."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    model, batch = model.double(), Batch((torch.randn(2, 3).double(),), torch.tensor([0, 2]))
    estimator, plan, state = LikelihoodRatio(1e-5, law="orthogonal"), Plan.uniform(2, copies), None
    gradient, error, told = exact(model, batch), 0.0, 0.0
    for number in range(600):
        oracle = ModelOracle(Engine(model, cross_entropy), batch)
        state = estimator.init(oracle.params) if state is None else state
        estimate, state = estimator.estimate(
            oracle, oracle.params, state, key=Key.root(number), plan=plan
        )
        error += sum(float((estimate.grad[n] - g).square().sum()) for n, g in gradient.items())
        told += float(estimate.info["variance"])
    if copies == 8:
        assert told == 0.0 and error < 1e-6
    else:
        assert told == pytest.approx(error, rel=0.3)


def test_memory_does_not_grow_with_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live bytes of a whole step with four times the copies: bookkeeping grows, nothing else."""
    monkeypatch.setattr("fwdlearn.noise._KEEP_BYTES", 0)
    monkeypatch.setattr("fwdlearn.noise._WORDS", 2**13)
    monkeypatch.setattr("fwdlearn.noise._NUMBERS", {"cpu": 2**10})
    model, batch = made("strided", rows=64)
    peaks = []
    for copies in (4, 16):
        oracle = ModelOracle(Engine(model, cross_entropy, memory_budget=2**17), batch)
        dict(oracle.sites)
        with LiveBytes(torch.device("cpu")) as live:
            estimator = LikelihoodRatio(law="gaussian")
            estimate, _ = estimator.estimate(
                oracle, oracle.params, Balance(), key=KEY, plan=Plan.uniform(64, copies)
            )
            flat(estimate.grad, estimate.grad)
        peaks.append(live.peak)
    # Two dozen numbers of bookkeeping a query; its outputs alone are 75.
    assert peaks[1] - peaks[0] < 24 * 8 * 64 * (16 - 4)
    assert sum(math.prod(output.shape) for output in oracle.sites.values()) == 75


class Positions(nn.Module):
    """Adds a bare parameter to what a layer puts out, and multiplies by another in a way that has
    no local product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.twist = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)) @ torch.linalg.matrix_exp(self.twist))


def test_parameters_that_no_layer_feeds_are_refused_or_get_noise_themselves() -> None:
    model = Positions().double()
    batch = Batch((torch.randn(4, 3).double(),), torch.tensor([0, 1, 1, 0]))
    message = (
        r"LikelihoodRatio cannot learn twist from noise at outputs: .* has no local product\. "
        r"Give it noise itself with noise='hybrid', or set requires_grad to False\."
    )
    with pytest.raises(UsageError, match=message):
        ask(LikelihoodRatio(), model, batch, Plan.uniform(4, 2))
    gradient = exact(model, batch)
    many = batch.select(torch.arange(80) % 4)
    estimate = ask(LikelihoodRatio(1e-4, noise="hybrid"), model, many, Plan.uniform(80, 100))
    error = (estimate.grad["twist"] - gradient["twist"]).norm() / gradient["twist"].norm()
    assert float(error) < 0.25


def test_balance_lowers_the_variance() -> None:
    """Inputs thirty times as large: the best sizes have (30 + 1)^2 / (2 (30^2 + 1)), half the
    variance of equal ones, where the two layers have cotangents of one size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = model.double()
    with torch.no_grad():
        model[0].weight.div_(30)
    batch = Batch((30 * torch.randn(16, 8).double(),), torch.arange(16) % 3)
    plan, said = Plan.uniform(16, 8), {}
    for balance in (True, False):
        estimator = LikelihoodRatio(1e-3, balance=balance)
        oracle = ModelOracle(Engine(model, cross_entropy), batch)
        state, values = estimator.init(oracle.params), []
        for step in range(60):
            estimate, state = estimator.estimate(
                oracle, oracle.params, state, key=Key.root(step), plan=plan
            )
            values.append(float(estimate.info["variance"]))
        said[balance] = sum(values[30:]) / 30
    assert said[True] < 0.75 * said[False]


def test_sizes_follow_the_fourth_root_and_stay_in_bounds() -> None:
    rms = {"a": 2.0, "b": 0.5, "c": 0.0}
    assert Balance().sizes(rms) == {"a": 2.0, "b": 0.5, "c": 0.02}
    assert Balance().sizes({"a": 0.0}) == {"a": 0.01}
    known = Balance(1, 50, {"a": 16.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}).sizes(
        {"a": 1.0, "b": 1.0}
    )
    assert known["a"] / known["b"] == pytest.approx(2.0)
    assert known["a"] * known["b"] == pytest.approx(1.0)
    wild = Balance(1, 50, {"a": 1e20, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    assert wild.sizes({"a": 1.0, "b": 1.0}) == pytest.approx({"a": 8.0, "b": 1 / 8})


REFUSALS = [
    ({"sigma": 0.0}, "LikelihoodRatio(sigma=...) must be positive, got 0.0."),
    (
        {"noise": "inputs"},
        "LikelihoodRatio(noise=...) must be one of outputs, weights, hybrid, got 'inputs'.",
    ),
    (
        {"law": "cauchy"},
        "LikelihoodRatio(law=...) must be one of rademacher, gaussian, laplace, orthogonal, "
        "sobol for noise='outputs', got 'cauchy'.",
    ),
    (
        {"law": "laplace", "noise": "weights"},
        "LikelihoodRatio(law=...) must be one of rademacher, gaussian for noise='weights', got "
        "'laplace'.",
    ),
    (
        {"baseline": "mean"},
        "LikelihoodRatio(baseline=...) must be one of clean, leave-one-out, antithetic, got "
        "'mean'.",
    ),
    ({"blocks": 0}, "LikelihoodRatio(blocks=...) must be at least 1, got 0."),
    (
        {"weights": ("a",)},
        "LikelihoodRatio(weights=...) must be left to noise='hybrid', got ('a',).",
    ),
    (
        {"noise": "weights", "blocks": 2},
        "LikelihoodRatio(blocks=...) divides layers with noise at their outputs, of which "
        "noise='weights' leaves none.",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSALS)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LikelihoodRatio(**settings)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (
            LikelihoodRatio(blocks=3),
            "LikelihoodRatio(blocks=3) divides 1 layers with noise into more blocks than there "
            "are; blocks=1 is layer by layer.",
        ),
        (
            LikelihoodRatio(noise="hybrid"),
            "LikelihoodRatio(noise='hybrid') finds noise on outputs alone to be in place here; "
            "noise='outputs' does that with fewer queries.",
        ),
        (
            LikelihoodRatio(noise="hybrid", weights=("*",)),
            "LikelihoodRatio(noise='hybrid') finds noise on weights alone to be in place here; "
            "noise='weights' does that with fewer queries.",
        ),
        (
            LikelihoodRatio(baseline="leave-one-out"),
            "LikelihoodRatio(baseline='leave-one-out') needs two directions a row or more; raise "
            "the allocator's directions, or use baseline='clean'.",
        ),
    ],
)
def test_refusals_of_a_model_or_plan(estimator: LikelihoodRatio, message: str) -> None:
    model, batch = made("linear")
    with pytest.raises(UsageError) as error:
        ask(estimator, model, batch, Plan.uniform(3, 1))
    assert str(error.value) == message


def test_quasi_random_points_have_an_end() -> None:
    model = nn.Sequential(nn.Linear(2, 30_000), nn.ReLU(), nn.Linear(30_000, 2))
    batch = Batch((torch.randn(1, 2),), torch.tensor([0]))
    message = "Sobol points have 21201 dimensions at most, but the noise of a row has 30000"
    with pytest.raises(UsageError, match=message):
        ask(LikelihoodRatio(law="sobol"), model, batch, Plan.uniform(1, 2))
