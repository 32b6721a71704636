"""The ladder: stepping down, and saying why; what can never run is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine, trainable
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

from .models import CASES, Convolutions, built, cross_entropy, features, images

ROW = torch.arange(4)


def chosen(model: nn.Module, batch: Batch) -> tuple[str, str]:
    engine = Engine(model, cross_entropy)
    family = Directions(Key.root(0), dict(engine.params), 4)
    with torch.inference_mode():
        engine.losses(batch, ROW, family, ROW, 0.01)
    assert engine.choice is not None
    return engine.choice.rung, engine.choice.reason


class Escaping(nn.Module):
    """Reads a parameter into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 5)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale.item()


class Counting(nn.Module):
    """Does something else with three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x if len(x) != 3 else x + self.inner.bias


class Mixing(nn.Module):
    """Subtracts part of the mean over the rows."""

    part = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x - self.part * x.mean(0)


class MixingLittle(Mixing):
    part = 0.05


class Chance(nn.Module):
    """Draws other numbers for every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize(
    ("model", "expected", "reason"),
    [
        (Escaping, "sequential", "item() takes a parameter out of torch"),
        (Counting, "copies", "fold: the operations depend on how many rows there are; equals the"),
        (Mixing, "sequential", "depends on the rows beside it"),
        (MixingLittle, "copies", "fold: the loss of a row depends on the rows beside it"),
        (Chance, "sequential", "called random operation"),
    ],
)
def test_steps_down_and_says_why(model: type[nn.Module], expected: str, reason: str) -> None:
    rung, said = chosen(model(), features(4))
    assert rung == expected
    assert reason in said


def test_a_perturbation_that_is_missed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check catches a rule that forgets what it is for."""
    from fwdlearn.engine import rules

    def forgetful(call, input, weight, bias=None):
        return torch.nn.functional.linear(input, weight, bias)

    monkeypatch.setitem(rules.RULES, torch.nn.functional.linear, forgetful)
    rung, said = chosen(
        nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 5)), features(4)
    )
    assert rung == "copies"
    assert "fold: differs from the reference" in said


def test_insisting_on_the_fold_is_refused_with_the_reason() -> None:
    engine = Engine(Escaping(), cross_entropy, rung="fold")
    family = Directions(Key.root(0), dict(engine.params), 4)
    with pytest.raises(UsageError, match="'fold' was asked for, but item.. takes a parameter"):
        engine.losses(features(4), ROW, family, ROW, 0.01)


def test_batch_norm_in_training_mode_needs_shared_directions() -> None:
    model, batch = Convolutions().train(), images(4)
    before = {name: value.clone() for name, value in model.named_buffers()}
    engine = Engine(model, cross_entropy)
    family = Directions(Key.root(0), dict(engine.params), 4)
    with pytest.raises(UsageError, match="set the allocator's sharing to 'shared'"):
        engine.losses(batch, ROW, family, ROW, 0.01)
    assert engine.choice is not None and engine.choice.rung == "sequential"
    losses = engine.losses(batch, ROW, family, torch.zeros_like(ROW), 0.01)
    assert losses.isfinite().all()
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["mlp", "bert", "cnn"])
def test_weights_and_buffers_stay_bitwise_the_same(name: str) -> None:
    case, model = CASES[name], built(name, torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = 0

    def objective(output: object, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls >= 9:
            raise RuntimeError("in the middle")
        return case.objective(output, targets)

    batch = case.batch(6)
    for rung in ("auto", "sequential"):
        engine = Engine(model, objective, rung=rung)
        family = Directions(Key.root(0), dict(engine.params), 6)
        row, calls = torch.arange(6), 0
        with torch.inference_mode(), pytest.raises(RuntimeError, match="in the middle"):
            for _ in range(9):
                engine.losses(batch, row, family, row, 0.5)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_an_objective_without_rows_is_refused() -> None:
    engine = Engine(built("mlp", torch.float32), lambda output, targets: output.mean())
    with pytest.raises(UsageError, match=r"must return one loss a row, \[1\], got \(\)"):
        engine.losses(features(4), ROW)


def test_settings_are_checked() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(
        UsageError, match="rung must be auto, fold, copies or sequential, got 'quick'"
    ):
        Engine(model, cross_entropy, rung="quick")
    with pytest.raises(UsageError, match="memory_budget must be positive"):
        Engine(model, cross_entropy, memory_budget=0)
    with pytest.raises(UsageError, match="Linear has no trainable parameter"):
        Engine(model.requires_grad_(False), cross_entropy)


def test_names_do_not_depend_on_the_order_of_registration() -> None:
    class Pair(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            shared = nn.Linear(3, 3)
            setattr(self, first, shared)
            setattr(self, second, shared)
            self.other = nn.Linear(3, 3)

    names = list(trainable(Pair("z", "a")))
    assert (
        names
        == list(trainable(Pair("a", "z")))
        == ["a.bias", "a.weight", "other.bias", "other.weight"]
    )


def test_dropout_masks_belong_to_rows() -> None:
    """All queries of a row see one mask, on both rungs, and no global generator moves."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.4, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(48, 5)).double().train()
    batch = CASES["encoder_layer"].batch(4).to("cpu", torch.float64)
    row = torch.tensor([0, 0, 1, 3, 3, 2])
    direction = torch.tensor([0, 1, 2, 3, 0, 1])
    state = torch.random.get_rng_state()
    answers = []
    for rung in ("auto", "sequential"):
        engine = Engine(model, cross_entropy, rung=rung)
        family = Directions(Key.root(0), dict(engine.params), 4)
        key = Key.root(3)
        with torch.inference_mode():
            answers.append(engine.losses(batch, row, family, direction, 1e-3, key))
            clean = engine.losses(batch, row, dropout=key)
            again = engine.losses(batch, row, dropout=key)
            other = engine.losses(batch, row, dropout=Key.root(4))
        assert engine.choice is not None and engine.choice.rung == (
            "fold" if rung == "auto" else rung
        )
        assert torch.equal(clean, again)
        assert clean[0] == clean[1] and not torch.equal(clean, other)
        assert (answers[-1] - clean).abs().max() < 0.05
    torch.testing.assert_close(*answers, rtol=1e-10, atol=0)
    assert torch.equal(state, torch.random.get_rng_state())
