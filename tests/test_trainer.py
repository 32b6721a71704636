"""The loop: what it counts, what it repeats exactly, what it refuses."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.allocators import (
    AdaptiveDirections,
    BernoulliAllocator,
    Blocks,
    ConfidenceSkip,
    GaussianAllocator,
    Neyman,
    Uniform,
)
from fwdlearn.blackbox import BlackBox
from fwdlearn.data import Data, DataInfo, Rows, digits
from fwdlearn.errors import BackwardError, NonFiniteError, UsageError
from fwdlearn.estimators import AIMZO, LOZO, SPSA, ForwardGradient, HiZOO, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.models import mlp
from fwdlearn.objectives import cross_entropy, mean_squared_error, returned, zero_one
from fwdlearn.optim import NormalizedSGD
from fwdlearn.trainer import Trainer


def tiny(rows: int = 40) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    info = DataInfo("features", (6,), 4)
    return Data(info, Rows(x[:30], y[:30]), Rows(x[30:], y[30:]))


class Memory:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.meta: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def start(self, meta: dict[str, Any]) -> None:
        self.meta = meta

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def finish(self, summary: dict[str, Any]) -> None:
        self.summary = summary


def trainer(model: nn.Module | None = None, **settings: Any) -> Trainer:
    data = settings.pop("data", tiny())
    model = model or mlp(data.info, hidden=(8,)).module
    optimizer = settings.pop("optimizer", torch.optim.SGD)
    made = optimizer([p for p in model.parameters() if p.requires_grad], lr=settings.pop("lr", 0.1))
    parts = {
        "objective": cross_entropy,
        "estimator": RandomPerturbation(),
        "allocator": Uniform(4),
        "batch_size": 8,
        **settings,
    }
    if "queries" not in parts:
        parts.setdefault("steps", 12)
    order = [parts.pop(name) for name in ("objective", "estimator", "allocator")]
    return Trainer(model, data, *order, made, **parts)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_counts_and_records() -> None:
    sink = Memory()
    summary = trainer(sinks=[sink], log_every=5, evaluate_every=6).train()
    assert summary["status"] == "finished"
    assert summary["steps"] == 12
    assert summary["queries"] == 12 * 8 * (4 + 1) == sink.meta["queries"]
    assert summary["forwards"] == summary["queries"] / 8
    assert [r["step"] for r in sink.records if "train.loss" in r] == [5, 10, 12]
    assert [r["step"] for r in sink.records if "eval.loss" in r] == [6, 12]
    assert summary["eval.accuracy"] == sink.records[-1]["eval.accuracy"]
    assert summary["engine.rung"] == "fold"
    assert summary["memory.weights_bytes"] == 4 * (6 * 8 + 8 + 8 * 4 + 4)
    assert summary["memory.peak_bytes"] > 2**20
    for record in sink.records:
        assert all(v is None or isinstance(v, int) or math.isfinite(v) for v in record.values())


def test_a_budget_is_never_exceeded() -> None:
    summary = trainer(queries=500).train()
    assert summary["queries"] == 480 and summary["steps"] == 12


@pytest.mark.parametrize(
    "estimator", [RandomPerturbation(1e-2), SPSA(), RandomPerturbation(0.1, "leave-one-out")]
)
def test_same_seed_same_weights_bit_for_bit(estimator: Any) -> None:
    runs = []
    for seed in (0, 0, 1):
        run = trainer(estimator=estimator, seed=seed, optimizer=torch.optim.Adam)
        run.train()
        runs.append(weights(run.model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_global_generators_are_untouched() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trainer(train_mode=True).train()
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_streaming_equals_one_step_with_all_gradients(optimizer: Any) -> None:
    streamed, whole = (trainer(optimizer=optimizer, lr=0.01) for _ in range(2))
    state = None
    for step in range(5):
        made, state, _ = streamed._estimate(step, None, None)
        streamed._update(made.estimate, made.names)
        made, state, _ = whole._estimate(step, None, None)
        for name, parameter in whole.engine.params.items():
            parameter.grad = made.estimate.grad[name]
        whole.optimizer.step()
        whole.optimizer.zero_grad()
    assert torch.equal(weights(streamed.model), weights(whole.model))


def test_data_order_is_a_function_of_seed_and_step() -> None:
    one, other = trainer(), trainer()
    later = [one.batch(step).targets for step in (7, 2, 5)]
    assert torch.equal(other.batch(5).targets, later[2])
    assert torch.equal(other.batch(7).targets, later[0])
    # 30 rows in batches of 8: an epoch has three, and no row comes twice in it.
    rows = torch.cat([one.batch(step).args[0] for step in range(3)])
    assert len(rows.unique(dim=0)) == 24
    assert not torch.equal(one.batch(0).args[0], one.batch(3).args[0])


# Chance is log(10) = 2.3, and an error of 0.9 with a standard deviation of 0.013 on 500 rows.
@pytest.mark.parametrize(
    ("objective", "sigma", "most"), [(cross_entropy, 1e-3, 1.4), (zero_one, 0.3, 0.8)]
)
def test_it_learns_with_and_without_a_derivative(objective: Any, sigma: float, most: float) -> None:
    data = digits()
    model = mlp(data.info, hidden=()).module
    batch = data.train.batch(torch.arange(500))

    def loss() -> float:
        with torch.no_grad():
            return float(objective(model(*batch.args), batch.targets).mean())

    assert loss() > 0.8
    trainer(
        model,
        data=data,
        objective=objective,
        estimator=RandomPerturbation(sigma),
        batch_size=64,
        steps=300,
        optimizer=torch.optim.Adam,
        lr=0.01,
    ).train()
    assert loss() < most


def test_backward_is_refused_in_objectives_and_models() -> None:
    def objective(output: Tensor, targets: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(1, requires_grad=True)
            (x * 2).sum().backward()
        return cross_entropy(output, targets)

    with pytest.raises(BackwardError, match="remove the call to backward"):
        trainer(objective=objective).train()


def test_evaluation_mode_unless_asked() -> None:
    seen = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.training)
            return self.inner(x)

    model = Watched()
    trainer(model, evaluate_every=4).train()
    assert not any(seen)
    assert model.training
    seen.clear()
    trainer(model, evaluate_every=4, train_mode=True).train()
    assert any(seen) and not all(seen)


def test_weights_survive_a_failure_in_the_middle() -> None:
    calls = 0

    def objective(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise RuntimeError("out of luck")
        return cross_entropy(output, targets)

    run = trainer(objective=objective, allocator=Uniform(2))
    run._choose()
    before, calls = weights(run.model), 18
    with pytest.raises(RuntimeError, match="out of luck"):
        run.train()
    assert torch.equal(weights(run.model), before)


def test_non_finite_losses_stop_the_run() -> None:
    def objective(output: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(output, targets) * float("nan")

    with pytest.raises(NonFiniteError, match="not finite; lower the learning rate or sigma"):
        trainer(objective=objective, rung="sequential").train()


def test_regression() -> None:
    x = torch.linspace(-1, 1, 32)[:, None]
    data = Data(DataInfo("features", (1,), None), Rows(x, 3 * x), Rows(x, 3 * x))
    run = trainer(
        data=data, model=mlp(data.info, hidden=()).module, objective=mean_squared_error, steps=200
    )
    summary = run.train()
    assert summary["eval.accuracy"] is None
    assert summary["eval.loss"] < 0.01


def test_explain_leaves_the_weights_alone() -> None:
    run = trainer()
    before = weights(run.model)
    facts = run.explain()
    assert torch.equal(weights(run.model), before)
    assert facts["rung"] == "fold" and facts["queries_per_step"] == 40
    assert facts["directions"] == 32 and facts["trainable"] == 92
    assert facts["queries_per_second"] > 0 and facts["memory_bytes"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"Trainer\(steps=...\) must be at least 1, got 0"),
        ({"batch_size": 0}, r"Trainer\(batch_size=...\) must be at least 1"),
        ({"steps": 3, "queries": 900}, "exactly one of steps"),
        ({"queries": 30}, "less than one step, which takes 40 queries"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates the loss inside its step"),
        ({"rung": "quick"}, "rung must be auto"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(**settings)


def test_an_optimizer_that_misses_a_parameter_is_refused() -> None:
    model = mlp(tiny().info, hidden=(8,)).module
    optimizer = torch.optim.SGD([next(model.parameters())], lr=0.1)
    with pytest.raises(UsageError, match="does not hold layers.0.bias"):
        Trainer(model, tiny(), cross_entropy, SPSA(), Uniform(), optimizer, steps=1)


def test_an_estimator_whose_need_is_not_met_names_both_sides() -> None:
    from typing import Protocol, runtime_checkable

    from fwdlearn.estimator import Traits
    from fwdlearn.oracle import LossOracle

    @runtime_checkable
    class CurvatureOracle(LossOracle, Protocol):
        def curvatures(self, row: Tensor) -> Tensor: ...

    class Curved(SPSA):
        traits = Traits(CurvatureOracle, "weights", "gradient", 1)

    with pytest.raises(
        UsageError,
        match="Curved needs CurvatureOracle .CurvatureOracle.; ModelOracle offers only losses",
    ):
        trainer(estimator=Curved())


def test_an_estimator_can_have_slopes() -> None:
    from tests.test_conformance import ForwardGradient

    summary = trainer(estimator=ForwardGradient(), steps=3).train()
    assert summary["queries"] == 3 * 8 * 4


def test_a_step_down_in_the_middle_is_reported() -> None:
    class Fickle(nn.Module):
        """After a while it reads a weight into Python."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            factor = float(self.inner.bias.sum().item() > 9) if self.calls > 60 else 0.0
            return self.inner(x) * (1 + factor)

    sink = Memory()
    summary = trainer(Fickle(), steps=40, sinks=[sink]).train()
    assert sink.meta["rung"] == "fold"
    (said,) = [r for r in sink.records if "engine.rung" in r]
    assert said["engine.rung"] == summary["engine.rung"] == "sequential"
    assert "takes a parameter out of torch" in said["engine.reason"]


class _Reads(Uniform):
    """Uniform, but it reads signals and remembers them."""

    signals = frozenset({"loss", "residual", "target", "example"})

    def allocate(self, rows: int, signals: Any, state: Any, *, key: Key) -> tuple[Plan, Any]:
        plan, _ = super().allocate(rows, signals, state, key=key)
        return plan, {**signals}


@pytest.mark.parametrize(
    ("estimator", "queries"),
    # The estimator's own clean pass is the one that the signals are read from.
    [
        (RandomPerturbation(), 8 * 5),
        (SPSA(), 8 * 9),
        (RandomPerturbation(0.1, "leave-one-out"), 40),
    ],
)
def test_signals_come_from_one_clean_pass_that_is_counted(estimator: Any, queries: int) -> None:
    run = trainer(estimator=estimator, allocator=_Reads(4), steps=3)
    calls = [0]
    run.model.register_forward_pre_hook(lambda module, args: calls.__setitem__(0, calls[0] + 1))
    # The first step measures how much fits into a pass.
    run._estimate(0, None, None)
    calls[0] = 0
    made, _, read = run._estimate(0, None, None)
    assert calls[0] == 2, "one pass for the signals and one for all queries"
    assert made.estimate.queries == queries == run._cost(None)
    batch = run.batch(0)
    output = run.model(*batch.args)
    torch.testing.assert_close(read["loss"], cross_entropy(output, batch.targets))
    unit = nn.functional.one_hot(batch.targets, 4)
    torch.testing.assert_close(read["residual"], (output.softmax(1) - unit).norm(dim=1))
    assert torch.equal(read["target"], batch.targets)
    assert torch.equal(run.data.train.batch(read["example"]).args[0], batch.args[0])
    assert run.train()["queries"] == 3 * queries


def test_measuring_changes_no_bit_of_a_clean_baseline() -> None:
    plain, reading = trainer(), trainer(allocator=_Reads(4))
    assert plain.train()["queries"] == reading.train()["queries"]
    assert torch.equal(weights(plain.model), weights(reading.model))


def test_a_budget_counts_the_clean_pass() -> None:
    summary = trainer(estimator=SPSA(), allocator=Neyman(4), queries=500).train()
    assert summary["steps"] == 6 and summary["queries"] == 6 * 8 * 9


def test_signals_follow_the_dropout_of_the_step() -> None:
    data = tiny()
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    run = trainer(model, data=data, allocator=_Reads(4), train_mode=True)
    model.train()
    oracle = run._oracle(run.batch(0), run.key.fold("step").fold(0).fold("dropout"))
    _, _, read = run._estimate(0, None, None)
    torch.testing.assert_close(read["loss"], oracle.losses(torch.arange(8)))


@pytest.mark.parametrize(
    "allocator",
    [
        Neyman(4),
        Neyman(4, "loss"),
        Neyman(4, "running"),
        GaussianAllocator(4),
        BernoulliAllocator(4),
        ConfidenceSkip(4),
    ],
    ids=lambda allocator: repr(allocator)[:24],
)
def test_every_allocator_trains_and_repeats(allocator: Any) -> None:
    runs = []
    for _ in range(2):
        run = trainer(allocator=allocator, steps=6)
        assert run.train()["queries"] == 6 * 8 * 5
        runs.append(weights(run.model))
    assert torch.equal(*runs)


def test_unknown_signals_are_refused() -> None:
    class Peeks(Uniform):
        signals = frozenset({"gradient"})

    with pytest.raises(UsageError, match="reads the signal 'gradient', which the trainer does not"):
        trainer(allocator=Peeks(4))


def test_a_residual_of_losses_alone_is_refused() -> None:
    box = BlackBox({"w": torch.ones(6)}, lambda params, rows: rows.args[0] @ params["w"])
    data = Data(DataInfo("features", (6,), 4), tiny().train)
    run = trainer(box, data=data, objective=returned, allocator=Neyman(4))
    with pytest.raises(UsageError, match="the signal 'loss' needs neither"):
        run.train()
    run = trainer(box, data=data, objective=returned, allocator=Neyman(4, "loss"), steps=2)
    assert run.train()["queries"] == 2 * 8 * 5


def test_a_budget_that_changes_is_kept_and_the_schedule_follows_it() -> None:
    rates = []

    class Falling(AdaptiveDirections):
        def allocate(self, *args: Any, **kwargs: Any) -> Any:
            rates.append(run.optimizer.param_groups[0]["lr"])
            return super().allocate(*args, **kwargs)

    budget = {"queries": 8 * 9 * 20, "divergence": None}
    run = trainer(allocator=Falling(8, target=1e-6), lr=1.0, **budget)
    run.schedule = torch.optim.lr_scheduler.LinearLR(run.optimizer, 1.0, 0.0, run._planned())
    summary = run.train()
    # It falls from 8 directions to 1: more steps than planned, all within the budget.
    assert run._planned() == 20 < summary["steps"]
    assert 8 * 9 * 20 - 8 * 2 < summary["queries"] <= 8 * 9 * 20
    assert rates[0] == 1.0 and 0 < rates[-1] < 0.06
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    "estimator", [RandomPerturbation(), ForwardGradient()], ids=lambda one: type(one).__name__
)
def test_what_every_step_is_about_counts_once(estimator: Any) -> None:
    allocator = Blocks(("*.weight", "*"), 4, rule="uniform", always=("layers.0.*",))
    run = trainer(estimator=estimator, allocator=allocator, steps=1)
    made, _, _ = run._estimate(0, run.estimator.init(run.engine.params), run.allocator.init())
    grad = made.estimate.grad
    for name in made.names:
        factor = 1 if name.startswith("layers.0.") else 2
        assert torch.equal(grad[name], grad.gradient[name] * factor)  # type: ignore[attr-defined]
    assert "variance" not in made.estimate.info


@pytest.mark.parametrize(
    "estimator",
    [LOZO(1e-2, lazy=2), AIMZO(1e-2, width=2, refresh=2), HiZOO(1e-2), ForwardGradient()],
    ids=lambda one: type(one).__name__,
)
@pytest.mark.parametrize("sharing", ["private", "shared"])
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("kind", ["momentum", "Adam", "normalized"])
def test_methods_compose(estimator: Any, sharing: str, blocks: bool, kind: str) -> None:
    """Every estimator with every way to share, with blocks, and with what optimizers remember."""
    makes: dict[str, Any] = {
        "momentum": partial(torch.optim.SGD, momentum=0.9),
        "Adam": torch.optim.Adam,
        "normalized": partial(NormalizedSGD, momentum=0.9),
    }
    allocator: Any = Uniform(4, sharing=sharing)
    if blocks:
        allocator = Blocks(("layers.0.*", "*"), 4, sharing=sharing, keep=2)
    run = trainer(estimator=estimator, allocator=allocator, optimizer=makes[kind], lr=1e-2, steps=5)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    summary = run.train()
    traits = estimator.traits
    assert summary["queries"] == 5 * 8 * (4 * traits.queries_per_direction + traits.queries_per_row)
    after = dict(run.model.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(p, before[name]) for name, p in after.items())


@pytest.mark.parametrize(
    "estimator", [RandomPerturbation(), ForwardGradient()], ids=lambda one: type(one).__name__
)
def test_a_step_about_a_block_leaves_the_rest_alone(estimator: Any) -> None:
    run = trainer(estimator=estimator, allocator=Blocks(("layers.0.*", "*"), 4), steps=1)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    made, _, _ = run._estimate(0, run.estimator.init(run.engine.params), run.allocator.init())
    assert made.plan.block is not None and set(made.estimate.grad) == set(made.names)
    assert made.plan.block.names(run.engine.params) == made.names
    run.train()
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(made.names)
