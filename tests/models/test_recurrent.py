"""Recurrent networks: torch's own cells as reference, steps as the whole, folded passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.data import DataInfo
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key
from fwdlearn.models import Recurrent, fold_into_weights, recurrent
from fwdlearn.models.built import weights_from
from fwdlearn.models.cells import KINDS
from fwdlearn.objectives import mean_squared_error
from fwdlearn.oracle import ModelOracle

SERIES = DataInfo("sequence", (7, 2), None, values=3, per_step=True)
ENDING = DataInfo("sequence", (7, 2), 4)
LETTERS = DataInfo("tokens", (7,), 5, per_step=True)
TORCH = {
    "elman": nn.RNN,
    "elman-relu": lambda *sizes, **more: nn.RNN(*sizes, nonlinearity="relu", **more),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}


def _model(info: DataInfo = SERIES, **settings: Any) -> Recurrent:
    module = recurrent(info, **settings).module
    assert isinstance(module, Recurrent)
    return module


def _series(rows: int = 5) -> Tensor:
    return torch.randn(rows, 7, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cell", list(TORCH))
def test_cells_are_torchs(cell: str) -> None:
    model = _model(cell=cell, hidden=[6, 6]).double()
    with weights_from(0):
        twin = TORCH[cell](2, 6, num_layers=2, batch_first=True).double()
    with torch.no_grad():
        for number, layer in enumerate(model.cells):
            for ours, theirs in (("input", "ih"), ("recurrent", "hh")):
                for part in ("weight", "bias"):
                    value = getattr(getattr(layer, ours), part)
                    getattr(twin, f"{part}_{theirs}_l{number}").copy_(value)
        x = _series().double()
        torch.testing.assert_close(model(x), model.head(twin(x)[0]), rtol=0, atol=1e-14)


def test_the_minimal_cell_forgets_and_takes_in_by_one_gate() -> None:
    model = _model(cell="minimal", hidden=[6], bias=False).double()
    x, h = _series()[:, 0].double(), torch.linspace(-1, 1, 30).double().view(5, 6)
    w, u = model.cells[0].input.weight, model.cells[0].recurrent.weight
    f = torch.sigmoid(x @ w[:6].T + h @ u[:6].T)
    expected = (1 - f) * h + f * torch.tanh(x @ w[6:].T + f * (h @ u[6:].T))
    _, state = model.step(x, {"0.h": h})
    torch.testing.assert_close(state["0.h"], expected)


@pytest.mark.parametrize("cell", list(KINDS))
@pytest.mark.parametrize("decorrelation", [None, 0.01])
def test_steps_are_the_whole_and_queries_fold(cell: str, decorrelation: float | None) -> None:
    model = _model(cell=cell, hidden=[6, 4], decorrelation=decorrelation)
    x = _series()
    with torch.no_grad():
        whole, state, parts = model(x), model.initial(5), []
        assert all(value.shape == (5, 6 if key[0] == "0" else 4) for key, value in state.items())
        for x_t in x.unbind(1):
            y, state = model.step(x_t, state)
            parts.append(y)
    assert whole.shape == (5, 7, 3)
    torch.testing.assert_close(torch.stack(parts, 1), whole, rtol=0, atol=1e-6)
    batch, row = Batch((x,), torch.zeros(5, 7, 3)), torch.arange(15) % 5
    answers = []
    for rung in ("fold", "sequential"):
        engine = Engine(model, mean_squared_error, rung)
        oracle = ModelOracle(engine, batch)
        directions = Directions(Key.root(1), oracle.params, 4)
        losses = oracle.losses(row, directions, torch.arange(15) % 4, 0.1)
        slopes = oracle.slopes(row, directions, torch.arange(15) % 4)[1]
        assert engine.choice is not None and engine.choice.rung == rung, engine.choice
        answers.append((losses, slopes))
    torch.testing.assert_close(answers[0][0], answers[1][0], rtol=0, atol=2e-6)
    torch.testing.assert_close(answers[0][1], answers[1][1], rtol=0, atol=2e-5)


def test_forward_mode_and_vmap_go_through() -> None:
    model = _model(cell="lstm").double()
    x = _series().double()
    params = {name: value.detach() for name, value in model.named_parameters()}
    tangents = {name: torch.ones(2, *value.shape).double() for name, value in params.items()}

    def at(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (x,))

    def slope(tangent: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(at, (params,), (tangent,))[1]

    slopes = torch.vmap(slope)(tangents)
    ahead, behind = ({n: v + s * 1e-6 for n, v in params.items()} for s in (1, -1))
    torch.testing.assert_close(slopes[0], (at(ahead) - at(behind)) / 2e-6, rtol=1e-6, atol=1e-7)
    assert torch.equal(slopes[0], slopes[1])


def test_one_output_at_the_end() -> None:
    model = _model(ENDING)
    x, state = _series(), model.initial(5)
    for x_t in x.unbind(1):
        y, state = model.step(x_t, state)
    assert model(x).shape == (5, 4)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-6)


def test_tokens_are_embedded() -> None:
    model = _model(LETTERS, embedding=3)
    tokens = torch.arange(14).view(2, 7) % 5
    assert model(tokens).shape == (2, 7, 5)
    assert model.embedding is not None and model.embedding.weight.shape == (5, 3)


@pytest.mark.parametrize("cell", ["gru", "lstm", "minimal"])
def test_units_begin_with_memories_of_all_lengths(cell: str) -> None:
    """What is held fades by 1 - 1/t a step, with t between 2 and the steps asked for."""
    model = _model(cell=cell, hidden=[200], remember=50)
    layer = model.cells[0]
    # Nothing comes in and nothing comes back: what is left is the gate's doing.
    layer.input.weight.data.zero_()
    layer.recurrent.weight.data.zero_()
    held = {name: torch.full_like(value, 1e-4) for name, value in model.initial(1).items()}
    slot = layer.kind.slots[-1]
    kept = []
    for value in (0.0, 1e-4):
        held[f"0.{slot}"] = torch.full((1, 200), value)
        with torch.no_grad():
            kept.append(model.step(torch.zeros(1, 2), held)[1][f"0.{slot}"])
    times = 1 / (1 - (kept[1] - kept[0]) / 1e-4)
    assert float(times.min()) >= 1.9 and float(times.max()) < 50.1
    # Uniform in [2, 50): the mean of 200 has a standard error of 1.0.
    assert abs(float(times.mean()) - 26) < 5


@pytest.mark.parametrize("cell", ["elman", "elman-relu"])
def test_without_gates_the_state_keeps_its_length(cell: str) -> None:
    weight = _model(cell=cell, hidden=[20], remember=5).cells[0].recurrent.weight
    torch.testing.assert_close(weight @ weight.T, 0.64 * torch.eye(20), rtol=0, atol=1e-5)


def test_decorrelation_folds_into_the_weights() -> None:
    model = recurrent(SERIES, decorrelation=0.1).module
    for module in model.modules():
        if hasattr(module, "matrix"):
            module.matrix += 0.1 * torch.ones_like(module.matrix)
    plain = fold_into_weights(model)
    assert set(plain.state_dict()) == set(_model().state_dict())
    torch.testing.assert_close(plain(_series()), model(_series()))


@pytest.mark.parametrize(
    ("info", "settings", "message"),
    [
        (DataInfo("features", (3,), 2), {}, "reads sequences or tokens, not features; data such"),
        (SERIES, {"cell": "gro"}, r"recurrent\(cell=...\) must be one of elman, .*, got 'gro'"),
        (SERIES, {"hidden": []}, r"recurrent\(hidden=...\) must hold one width or more.* got \[\]"),
        (SERIES, {"hidden": [4, 0]}, r"recurrent\(hidden=...\) .* got \[4, 0\]"),
        (SERIES, {"remember": 1}, r"recurrent\(remember=...\) must be at least 2, got 1"),
        (
            SERIES,
            {"remember": 9, "bias": False},
            "draws the biases of the gates of gru; bias must be true",
        ),
        (LETTERS, {"embedding": 0}, r"recurrent\(embedding=...\) must be at least 1, got 0"),
    ],
)
def test_messages(info: DataInfo, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recurrent(info, **settings)
