"""Black boxes: which calls they get, what comes back, how they fail, and that they are trained."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fwdlearn.allocator import Plan
from fwdlearn.allocators import Uniform
from fwdlearn.batch import Batch
from fwdlearn.blackbox import BlackBox, CallableOracle
from fwdlearn.data import Data, DataInfo, Rows
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.errors import BackwardError, UsageError
from fwdlearn.estimators import SPSA, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy, returned
from fwdlearn.oracle import LossOracle, ModelOracle
from fwdlearn.recipe.evaluate import evaluate
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.run import train
from fwdlearn.trainer import Trainer

ROW = torch.tensor([2, 0, 1, 1, 0, 3, 3, 2])
DIRECTION = torch.tensor([1, 0, 0, 2, 1, 1, 3, 1])
SCALE = torch.tensor([0.1, 0.1, 0.1, 0.1, -0.1, 0.1, 0.1, 0.1], dtype=torch.float64)

Answer = Callable[[Mapping[str, Any], Batch], Any]


def batch(rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator)
    return Batch((x,), torch.arange(rows) % 2)


def linear(params: Mapping[str, Tensor], rows: Batch) -> Tensor:
    return (rows.args[0] @ params["w"] - rows.targets).square()


def box(function: Answer = linear, **settings: Any) -> BlackBox:
    return BlackBox({"w": torch.tensor([1.0, -2.0, 0.5])}, function, **settings)


def family(oracle: LossOracle, count: int = 4) -> Directions:
    return Directions(Key.root(1), oracle.params, count)


def ask(oracle: LossOracle) -> Tensor:
    return oracle.losses(ROW, family(oracle), DIRECTION, SCALE)


@pytest.mark.parametrize("settings", [{}, {"rows_per_call": 1}, {"rows_per_call": 2, "workers": 3}])
def test_a_model_behind_a_black_box_gives_its_own_losses(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def call(params: Mapping[str, Tensor], rows: Batch) -> Tensor:
        # Of this call alone: functional_call puts the parameters into the module for a while.
        return functional_call(copy.deepcopy(model), dict(params), rows.args)

    rows = batch().to("cpu", torch.float64)
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    black = CallableOracle(BlackBox(params, call, **settings), rows, cross_entropy)
    plain = ModelOracle(Engine(model, cross_entropy, "sequential"), rows)
    assert list(black.params) == list(plain.params)
    torch.testing.assert_close(ask(black), ask(plain), rtol=1e-12, atol=0)
    torch.testing.assert_close(black.losses(ROW), plain.losses(ROW), rtol=1e-12, atol=0)
    assert black.queries == plain.queries == 2 * len(ROW)


@pytest.mark.parametrize(
    ("rows_per_call", "sizes"), [(None, [3, 4, 1, 2, 1, 1]), (1, [1] * 12), (2, None)]
)
def test_rows_of_one_point_share_a_call(rows_per_call: int | None, sizes: list[int] | None) -> None:
    asked = []

    def call(params: Mapping[str, Tensor], rows: Batch) -> Tensor:
        asked.append(len(rows))
        return linear(params, rows)

    oracle = CallableOracle(box(call, rows_per_call=rows_per_call), batch())
    ask(oracle)
    oracle.losses(torch.tensor([0, 1, 2, 3]))
    expected = sizes or [2, 1, 2, 2, 2, 1, 1, 1]
    assert sorted(asked) == sorted(expected)
    assert oracle.queries == sum(asked) == 12


def test_the_function_owns_what_it_is_given_and_keeps_what_it_returns() -> None:
    """It may write on its parameters, and may use the memory of its losses again."""
    memory = np.zeros(4)

    def call(params: Mapping[str, np.ndarray], rows: Batch) -> np.ndarray:
        losses = (np.asarray(rows.args[0]) @ params["w"]) ** 2
        params["w"][:] = np.nan
        memory[: len(losses)] = losses
        return memory[: len(losses)]

    black = box(call, numpy=True)
    oracle = CallableOracle(black, batch())
    first = ask(oracle)
    assert torch.equal(first, ask(oracle)) and first.isfinite().all()
    assert len(first.unique()) > 4
    assert oracle.losses(torch.tensor([0])).isfinite().all()
    assert black.state_dict()["w"].tolist() == [1.0, -2.0, 0.5]


def test_frozen_and_integer_parameters_are_passed_and_not_perturbed() -> None:
    seen: list[dict[str, Any]] = []

    def call(params: Mapping[str, Tensor], rows: Batch) -> list[float]:
        seen.append(dict(params))
        return [0.0] * len(rows)

    params = {"a.w": torch.ones(2), "a.table": torch.arange(3), "b": torch.zeros(())}
    black = BlackBox(params, call)
    black.get_parameter("b").requires_grad_(False)
    oracle = CallableOracle(black, batch())
    assert list(oracle.params) == ["a.w"]
    assert oracle.losses(ROW, family(oracle), DIRECTION, SCALE).tolist() == [0.0] * len(ROW)
    for given in seen:
        assert given["a.table"].tolist() == [0, 1, 2] and given["b"] == 0
        assert (given["a.w"] - 1).abs().sub(0.1).abs().max() < 1e-6


def test_calls_run_at_once_and_come_back_in_order() -> None:
    """A remote API whose answers come in any order; it needs four calls to answer the first."""
    together = threading.Barrier(4, timeout=10)
    jitter = random.Random(0)
    finished = []

    def call(params: Mapping[str, Tensor], rows: Batch) -> list[float]:
        together.wait()
        time.sleep(jitter.random() / 50)
        losses = linear(params, rows).tolist()
        finished.extend(losses)
        return losses

    remote = CallableOracle(box(call, workers=4, rows_per_call=1), batch())
    here = CallableOracle(box(rows_per_call=1), batch())
    assert torch.equal(ask(remote).float(), ask(here))
    assert finished != ask(here).tolist()
    assert remote.queries == 8


def test_a_failure_names_the_query_and_keeps_its_cause() -> None:
    def call(params: Mapping[str, Tensor], rows: Batch) -> Tensor:
        if 3 in rows.args[0][:, 0]:
            raise ConnectionError("the API is away")
        return linear(params, rows)

    rows = batch()
    rows.args[0][3, 0] = 3
    oracle = CallableOracle(box(call), rows)
    message = (
        r"the black box failed at query 0 \(row 2, 0.1 along direction 1\) and 2 more: "
        "ConnectionError: the API is away"
    )
    with pytest.raises(UsageError, match=message) as caught:
        ask(oracle)
    assert isinstance(caught.value.__cause__, ConnectionError)
    with pytest.raises(UsageError, match=r"failed at query 1 \(row 3\): ConnectionError"):
        CallableOracle(box(call, rows_per_call=1), rows).losses(torch.tensor([0, 3]))
    assert oracle.queries == 0


def test_of_several_failures_the_first_query_is_told_whichever_is_first_in_time() -> None:
    calls = 0

    def call(params: Mapping[str, Tensor], rows: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        place = float(rows.targets[0])
        time.sleep(0.05 * (place == 1))
        raise ConnectionError(f"row {place:.0f}")

    rows = Batch((torch.zeros(50, 1),), torch.arange(50) + 1.0)
    oracle = CallableOracle(box(call, workers=2, rows_per_call=1), rows)
    with pytest.raises(UsageError, match=r"query 0 \(row 0\): ConnectionError: row 1"):
        oracle.losses(torch.arange(50))
    assert calls <= 50


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda params, rows: linear(params, rows).mean(), r"each of 4 rows, not .* shape \(\)"),
        (lambda params, rows: [0.0, 1.0], r"each of 4 rows, not something of shape \(2,\)"),
        (lambda params, rows: None, "query 0 .row 0. and 3 more: TypeError: it returned NoneType"),
        (lambda params, rows: [[0], [1, 2], [], []], "ValueError: setting an array element"),
        (lambda params, rows: params["v"], "KeyError: 'v'"),
        (
            lambda params, rows: torch.zeros(4, 2),
            r"must return one loss a row, \[4\], got \(4, 2\)",
        ),
    ],
)
def test_answers_that_are_no_losses_are_refused(answer: Answer, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CallableOracle(box(answer), batch()).losses(torch.arange(4))


def test_backward_passes_are_refused_in_every_thread() -> None:
    def call(params: Mapping[str, Tensor], rows: Batch) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(1, requires_grad=True)
            (x * 2).sum().backward()
        return linear(params, rows)

    for workers in (1, 3):
        with pytest.raises(BackwardError):
            ask(CallableOracle(box(call, workers=workers), batch()))


def test_losses_that_are_not_finite_reach_the_estimator() -> None:
    def call(params: Mapping[str, Tensor], rows: Batch) -> Tensor:
        losses = linear(params, rows)
        losses[params["w"].sum() > 2] = float("inf")
        return losses

    oracle = CallableOracle(box(call), batch())
    # The sum is -0.5, and moves by 3 along an eighth of the directions: 80 miss it once in 40,000.
    plan = Plan.uniform(4, 20)
    estimate, _ = RandomPerturbation(1.0, baseline="clean").estimate(
        oracle, oracle.params, None, key=Key.root(0), plan=plan
    )
    assert 0 < int(estimate.info["nonfinite"]) < 40
    assert estimate.loss.isfinite() and estimate.grad["w"].isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: box(workers=0), r"BlackBox\(workers=...\) must be at least 1, got 0"),
        (lambda: box(rows_per_call=0), r"BlackBox\(rows_per_call=...\) must be at least 1"),
        (lambda: BlackBox({"train": torch.ones(1)}, linear), "'train' cannot name a parameter"),
        (lambda: BlackBox({"a": torch.ones(1), "a.b": torch.ones(1)}, linear), "'a.b' cannot name"),
        (lambda: BlackBox({"": torch.ones(1)}, linear), "'' cannot name a parameter"),
        (
            lambda: BlackBox({"w": torch.ones(1, dtype=torch.bfloat16)}, linear, numpy=True),
            "w is bfloat16, which numpy lacks",
        ),
        (lambda: box().train(), "a black box has no training mode"),
        (lambda: box()(torch.ones(1)), "a BlackBox is no model to call"),
        (lambda: CallableOracle(BlackBox({}, linear), batch()), "no trainable parameter"),
    ],
)
def test_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


# --- training -------------------------------------------------------------------------------


def swing(params: Mapping[str, np.ndarray], rows: Batch) -> np.ndarray:
    """A pendulum, stepped through time in numpy; no derivative anywhere."""
    times, seen = np.asarray(rows.args[0])[:, 0], np.asarray(rows.targets)[:, 0]
    angle, speed, step = np.full(len(times), 1.0), np.zeros(len(times)), 0.01
    for tick in range(int(times.max() / step)):
        moving = tick * step < times
        force = -np.exp(params["stiffness"]) * np.sin(angle) - params["friction"] * speed
        speed = np.where(moving, speed + step * force, speed)
        angle = np.where(moving, angle + step * speed, angle)
    return (angle - seen) ** 2


def pendulum() -> Data:
    times = np.linspace(0.1, 1.5, 32, dtype=np.float32)[:, None]
    true = {"stiffness": np.float64(1.2), "friction": np.float64(0.4)}
    angle = np.sqrt(swing(true, Batch((times,), np.full_like(times, -9.0)))) - 9.0  # type: ignore
    rows = Rows(torch.tensor(times), torch.tensor(angle, dtype=torch.float32)[:, None])
    return Data(DataInfo("features", (1,), None), rows, rows)


def trainer(black: BlackBox, data: Data, objective: Any = returned, **settings: Any) -> Trainer:
    estimator = settings.pop("estimator", SPSA(1e-2))
    optimizer = torch.optim.Adam(black.parameters(), lr=settings.pop("lr", 0.05))
    parts = {"batch_size": 16, "steps": 60, **settings}
    return Trainer(black, data, objective, estimator, Uniform(4, "shared"), optimizer, **parts)


def test_a_simulator_is_fitted() -> None:
    params = {"stiffness": np.array(0.0), "friction": np.array(0.0)}
    run = trainer(BlackBox(params, swing, numpy=True), pendulum(), lr=0.1)
    before = run.evaluate()["loss"]
    summary = run.train()
    # Three seeds reached 160 and more.
    assert summary["eval.loss"] < before / 20
    assert summary["eval.accuracy"] is None
    assert summary["engine.rung"] == "black box"
    assert summary["queries"] == 60 * 16 * 4 * 2
    # Arrays are trained where they lie.
    assert params["stiffness"] > 0.5


def test_workers_change_no_bit() -> None:
    found = []
    for workers in (1, 4):
        black = BlackBox(
            {"stiffness": torch.zeros(()), "friction": torch.zeros(())},
            swing,
            numpy=True,
            workers=workers,
            rows_per_call=3,
        )
        trainer(black, pendulum(), steps=4).train()
        found.append(torch.stack(list(black.parameters())))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rung": "fold"}, "not for a black box"),
        ({"memory_budget": 2**20}, "not for a black box"),
        ({"train_mode": True}, "a black box has no training mode"),
    ],
)
def test_what_is_for_models_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(box(), pendulum(), **settings).train()


def test_slopes_of_a_black_box_are_refused_by_name() -> None:
    from fwdlearn.estimator import Traits
    from fwdlearn.oracle import SlopeOracle

    class Sloped(SPSA):
        traits = Traits(SlopeOracle, "weights", "gradient", 1)

    with pytest.raises(UsageError, match="CallableOracle offers only losses"):
        trainer(box(), pendulum(), estimator=Sloped())


def test_explain_leaves_the_parameters_alone() -> None:
    black = BlackBox({"stiffness": torch.zeros(()), "friction": torch.zeros(())}, swing, numpy=True)
    facts = trainer(black, pendulum()).explain()
    assert facts["rung"] == "black box" and facts["queries_per_step"] == 128
    assert all(value == 0 for value in black.parameters())


def onnx_network(hidden: int = 8) -> tuple[Any, dict[str, np.ndarray]]:
    """A session of a perceptron whose weights are inputs with defaults, and those defaults."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    weights = {
        "fc1.weight": generator.normal(size=(6, hidden)).astype(np.float32) / 2,
        "fc1.bias": np.zeros(hidden, np.float32),
        "fc2.weight": generator.normal(size=(hidden, 4)).astype(np.float32) / 2,
        "fc2.bias": np.zeros(4, np.float32),
    }

    def info(name: str, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["h"]),
        helper.make_node("Tanh", ["h"], ["a"]),
        helper.make_node("Gemm", ["a", "fc2.weight", "fc2.bias"], ["y"]),
    ]
    inputs = [info("x", ["rows", 6]), *(info(n, list(v.shape)) for n, v in weights.items())]
    defaults = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "mlp", inputs, [info("y", ["rows", 4])], defaults)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session, weights


def test_an_onnx_model_is_trained_on_its_logits() -> None:
    session, weights = onnx_network()

    def call(params: Mapping[str, np.ndarray], rows: Batch) -> np.ndarray:
        return session.run(["y"], {"x": rows.args[0], **params})[0]

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    data = Data(DataInfo("features", (6,), 4), Rows(x, y), Rows(x, y))
    black = BlackBox(weights, call, numpy=True, workers=2)
    run = trainer(black, data, cross_entropy, steps=80, batch_size=64)
    # The same network in torch.
    weight = {name: torch.tensor(value) for name, value in weights.items()}
    hidden = torch.tanh(x @ weight["fc1.weight"]) @ weight["fc2.weight"]
    expected = float(nn.functional.cross_entropy(hidden, y))
    assert abs(run.evaluate()["loss"] - expected) < 1e-5
    summary = run.train()
    # Chance is 0.25, with a standard deviation of 0.03.
    assert summary["eval.accuracy"] > 0.6 and summary["eval.loss"] < expected - 0.3


RECIPE = """\
model: {name: "RECIPES:pendulum", friction: 0.3}
data: {name: "RECIPES:swings"}
objective: {name: returned}
estimator: {name: SPSA, sigma: 0.01}
allocator: {name: Uniform, directions: 2, sharing: shared}
optimizer: {name: Adam, lr: 0.05}
trainer: {batch_size: 16, steps: 5}
"""


def swings() -> Data:
    """Data as a recipe names it."""
    return pendulum()


def pendulum_model(friction: float = 0.0) -> BlackBox:
    """A model as a recipe names it."""
    params = {"stiffness": torch.zeros(()), "friction": torch.tensor(friction)}
    return BlackBox(params, swing, numpy=True)


def test_a_recipe_names_a_black_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    text = RECIPE.replace("RECIPES:pendulum", "test_blackbox:pendulum_model")
    file = tmp_path / "pendulum.yaml"
    file.write_text(text.replace("RECIPES", "test_blackbox"), "utf-8")
    recipe = load_recipe(str(file), [f"output.dir={tmp_path / 'run'}"])
    summary, folder = train(recipe, None)
    assert summary["engine.rung"] == "black box" and summary["queries"] == 5 * 16 * 2 * 2
    assert (folder / "model" / "model.safetensors").exists()
    assert abs(evaluate(folder)["loss"] - summary["eval.loss"]) < 1e-7
