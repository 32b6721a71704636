"""The rung of many copies: equal to the reference, bounded in memory, silent, without a trace."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine, copies, sequential
from fwdlearn.engine.queries import Queries
from fwdlearn.engine.trace import TraceError
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

from .models import CASES, Convolutions, built, cross_entropy, features, images, series

# Groups of one, two and three rows, out of order.
ROW = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
DIRECTION = torch.tensor([0, 1, 2, 1, 1, 0, 3, 3, 1, 0])
# Models of the matrix that no rung but the fold and the reference can run: they read values
# of their masks, or call recurrent kernels.
BEYOND = {"bert", "gpt2", "llama", "odd"}


def asked(engine: Engine, batch: Batch, dropout: Key | None = None, **family: Any) -> Queries:
    directions = Directions(Key.root(1), dict(engine.params), 4, **family)
    scale = torch.tensor([0.03, -0.02], dtype=torch.float64).repeat(5)
    return Queries(batch, ROW, directions, DIRECTION, scale, dropout)


def both(engine: Engine, queries: Queries, block: int = 8) -> tuple[Tensor, Tensor]:
    model, params, losses = engine.model, engine.params, engine.row_losses
    with torch.inference_mode():
        return (
            copies.run(model, params, queries, losses, block),
            sequential.run(model, params, queries, losses, block),
        )


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in BEYOND])
def test_copies_equal_the_reference(name: str, training: bool) -> None:
    case, model = CASES[name], built(name).train(training)
    if sequential.mixes_rows(model):
        pytest.skip("refused, as tested below")
    engine = Engine(model, case.objective)
    batch = case.batch(6).to("cpu", torch.float64)
    for rank in (1, None):
        queries = asked(engine, batch, Key.root(3) if training else None, rank=rank)
        one, other = both(engine, queries)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", sorted(BEYOND))
def test_what_vmap_cannot_run_is_said_in_a_sentence(name: str) -> None:
    case = CASES[name]
    engine = Engine(built(name), case.objective)
    with pytest.raises(TraceError) as caught:
        both(engine, asked(engine, case.batch(6).to("cpu", torch.float64)))
    assert 10 < len(str(caught.value)) <= 150 and "\n" not in str(caught.value)


def test_dropout_masks_are_those_of_the_other_rungs() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.4, batch_first=True)
    model = nn.Sequential(layer, nn.Dropout1d(0.3), nn.Flatten(), nn.Linear(48, 5))
    model = model.double().train()
    batch = series(6).to("cpu", torch.float64)
    engine = Engine(model, cross_entropy)
    state = torch.random.get_rng_state()
    one, other = both(engine, asked(engine, batch, Key.root(7)))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
    folded = Engine(model, cross_entropy, rung="fold")
    queries = asked(folded, batch, Key.root(7))
    with torch.inference_mode():
        third = folded.losses(
            batch, ROW, queries.directions, DIRECTION, queries.scale, queries.dropout
        )
    torch.testing.assert_close(one, third, rtol=1e-10, atol=0)
    unlike, _ = both(engine, asked(engine, batch, Key.root(8)))
    assert (unlike - one).abs().min() > 1e-3
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_as_the_reference_does(dtype: torch.dtype) -> None:
    engine = Engine(built("mlp", dtype), cross_entropy)
    queries = asked(engine, features(6).to("cpu", dtype))
    with torch.inference_mode():
        stack = copies._copies(engine.params, queries)
        for number, name in enumerate(["0.weight", "2.bias", "3.weight"]):
            copy = sequential.perturbed_copy(
                engine.params, queries.directions, int(DIRECTION[number]), queries.scale[number]
            )
            assert stack[name].dtype == dtype and torch.equal(stack[name][number], copy[name])
    one, other = both(engine, queries)
    torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_the_budget_bounds_the_copies_of_a_pass() -> None:
    """The peak, as the shapes of what the model sees; less than two copies are refused."""
    seen: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(10, 5)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.inner.weight
            while torch._C._functorch.is_batchedtensor(weight):
                weight = torch._C._functorch.get_unwrapped(weight)
                seen.append(len(weight))
            return self.inner(x)

    engine = Engine(Watched(), cross_entropy)
    size = 4 * (10 * 5 + 5)
    # Ten points of one row each.
    row = torch.arange(10) % 6
    family = Directions(Key.root(1), dict(engine.params), 10)
    scale = torch.full((10,), 0.1, dtype=torch.float64)
    queries = Queries(features(6), row, family, torch.arange(10), scale)
    found = []
    for budget, most in ((None, 10), (3 * size + 1, 3), (2 * size, 2)):
        seen.clear()
        with torch.inference_mode():
            found.append(
                copies.run(engine.model, engine.params, queries, engine.row_losses, 100, budget)
            )
        assert max(seen) == most and sum(seen) == 10
        torch.testing.assert_close(found[-1], found[0])
    seen.clear()
    copies.run(engine.model, engine.params, queries, engine.row_losses, 4)
    assert max(seen) == 4
    with pytest.raises(TraceError, match=r"two copies of the parameters \(0.0 MiB\) take more"):
        copies.run(engine.model, engine.params, queries, engine.row_losses, 100, 2 * size - 1)


def test_loops_are_named_and_nobody_is_warned(capfd: pytest.CaptureFixture[str]) -> None:
    layer = parametrizations.weight_norm(nn.Linear(10, 8))
    engine = Engine(nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 5)), cross_entropy)
    queries = asked(engine, features(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = both(engine, queries)
    torch.testing.assert_close(one, other)
    assert capfd.readouterr().err == ""
    loop = copies.looped(engine.model, engine.params, queries, engine.row_losses)
    assert loop is not None and "weight_norm" in loop
    plain = Engine(nn.Linear(10, 5), cross_entropy)
    assert copies.looped(
        plain.model, plain.params, asked(plain, features(6)), plain.row_losses
    ) is (None)
    # The switches of torch are as they were.
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._C._functorch._is_vmap_fallback_enabled()


class Counting(nn.Module):
    """Writes on a buffer, and on its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 5)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        with torch.no_grad():
            self.inner.weight.clamp_(-0.2, 0.2)
        return self.inner(x)


def test_what_a_pass_writes_leaves_no_trace() -> None:
    model = Counting()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, cross_entropy)
    queries = asked(engine, features(6))
    with torch.inference_mode():
        copies.run(model, engine.params, queries, engine.row_losses, 8)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_batch_norm_in_training_mode_is_refused() -> None:
    engine = Engine(Convolutions().train(), cross_entropy)
    with pytest.raises(TraceError, match="batch normalisation in training mode"):
        both(engine, asked(engine, images(6)))
    insisting = Engine(Convolutions().train(), cross_entropy, rung="copies")
    with pytest.raises(UsageError, match="rung 'copies' was asked for, but batch normalisation"):
        insisting.choose(images(6))


# --- the ladder -----------------------------------------------------------------------------


class Pairwise(nn.Module):
    """Compares the rows with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + 0.3 * (x @ x.T).mean(1, keepdim=True) * torch.arange(5)


def ask(engine: Engine, batch: Batch) -> Tensor:
    queries = asked(engine, batch)
    with torch.inference_mode():
        return engine.losses(batch, ROW, queries.directions, DIRECTION, queries.scale)


def test_where_the_fold_fails_copies_stand_in() -> None:
    batch, model = features(6), Pairwise()
    auto, reference = Engine(model, cross_entropy), Engine(model, cross_entropy, "sequential")
    torch.testing.assert_close(ask(auto, batch), ask(reference, batch))
    assert auto.choice is not None and auto.choice.rung == "copies"
    assert "fold: " in auto.choice.reason
    assert "equals the sequential reference to" in auto.choice.reason
    assert [choice.rung for choice in auto.events] == ["copies"]


def test_copies_can_be_asked_for() -> None:
    batch, model = features(6), built("mlp", torch.float32)
    engine, reference = Engine(model, cross_entropy, "copies"), Engine(model, cross_entropy)
    torch.testing.assert_close(ask(engine, batch), ask(reference, batch))
    assert engine.choice is not None and engine.choice.rung == "copies"
    with pytest.raises(UsageError, match="rung 'copies' was asked for, but two copies of the"):
        Engine(model, cross_entropy, "copies", memory_budget=1000).choose(batch)
    odd = built("odd", torch.float32)
    with pytest.raises(UsageError, match="rung 'copies' was asked for, but Batching rule not"):
        Engine(odd, cross_entropy, "copies").choose(series(6))


class Fickle(Pairwise):
    """Reads a value once it has seen large rows."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 10:
            return super().forward(x)
        return super().forward(x[:, 1:]) * float(x[0, 0] > -9)


def test_a_step_down_in_the_middle_is_an_event() -> None:
    engine = Engine(Fickle(), cross_entropy)
    ask(engine, features(6))
    batch = features(6, 11)
    reference = Engine(engine.model, cross_entropy, "sequential")
    torch.testing.assert_close(ask(engine, batch), ask(reference, batch))
    assert [choice.rung for choice in engine.events] == ["copies", "sequential"]
    assert "copies: " in engine.events[-1].reason


def test_an_error_of_the_model_is_no_reason_to_step_down() -> None:
    calls = 0

    def objective(output: Tensor, targets: Tensor) -> Tensor:
        if calls:
            raise RuntimeError("out of luck")
        return cross_entropy(output, targets)

    engine = Engine(Pairwise(), objective)
    ask(engine, features(6))
    calls = 1
    with pytest.raises(RuntimeError, match="out of luck"):
        ask(engine, features(6))
    assert engine.choice is not None and engine.choice.rung == "copies"
    with pytest.raises(RuntimeError, match="out of luck"):
        Engine(Pairwise(), objective).choose(features(6))
