"""Which way slopes are found, what is refused aloud, and what a pass must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine import slopes as slopes_module
from fwdlearn.engine.dual_rules import DUAL_RULES
from fwdlearn.engine.slopes import Slopes
from fwdlearn.errors import BackwardError, UsageError
from fwdlearn.keys import Key
from fwdlearn.objectives import zero_one
from fwdlearn.oracle import ModelOracle

from .models import CASES, Convolutions, built, cross_entropy, features, images, series
from .slope_reference import by_differences, by_jvp, check, queries

ROW = torch.tensor([0, 0, 1, 2, 2, 2, 3])
DIRECTION = torch.tensor([0, 1, 2, 0, 1, 3, 3])


def asked(
    model: nn.Module,
    batch: Batch,
    rung: str = "auto",
    objective: Callable[..., Tensor] = cross_entropy,
    shared: bool = False,
) -> tuple[Slopes, Tensor]:
    """The engine of slopes, and what it answers."""
    engine = Engine(model, objective)
    slopes = Slopes(model, engine.params, engine.row_losses, rung)
    family = Directions(Key.root(1), dict(engine.params), 4)
    row, direction = queries(len(batch), 4, private=False) if shared else (ROW, DIRECTION)
    with torch.inference_mode():
        return slopes, slopes(batch, row, family, direction)[1].clone()


@torch.library.custom_op("fwdlearn_tests::hidden", mutates_args=())
def hidden(x: Tensor) -> Tensor:
    """Has no derivative in forward mode, and none can be registered."""
    return x.sin()


hidden.register_fake(lambda x: torch.empty_like(x))


class Custom(nn.Module):
    """An operation of its own, on the way to the loss or beside it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.inner, self.head, self.share = nn.Linear(10, 8), nn.Linear(8, 5), share

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.head((1 - self.share) * x + self.share * hidden(x))


class CustomOnInputs(Custom):
    """The same where nothing moves yet: there is nothing to hide."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(hidden(x)))


class Function(torch.autograd.Function):
    """A function with no derivative of its own for either direction."""

    @staticmethod
    def forward(ctx: object, x: Tensor, gain: Tensor) -> Tensor:
        return x.sin() * gain


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(10, 8), nn.Linear(8, 5)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Function.apply(self.inner(x), self.gain))


class Escaping(nn.Module):
    """Takes a value that moves out of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x * float(x.square().sum())


class Numpy(Escaping):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + torch.from_numpy(x.detach().numpy()).sin()


class Mixing(Escaping):
    """Subtracts the mean over the rows."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).tanh()
        return x - x.mean(0)


class Broken(Escaping):
    """Fails with and without derivatives."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).view(len(x), 7)


@pytest.mark.parametrize("share", [1.0, 0.5, 1e-3])
def test_an_operation_that_hides_its_derivative_is_refused(share: float) -> None:
    """However little of the slope is hidden, and though `torch.func.jvp` says nothing."""
    model = Custom(share).double()
    batch = features(4).to("cpu", torch.float64)
    engine = Engine(model, cross_entropy)
    family = Directions(Key.root(1), dict(engine.params), 4)
    silent = by_jvp(engine, batch, family)
    exact = by_differences(engine, batch, family)
    assert (silent - exact).abs().max() > 1e-5
    with pytest.raises(UsageError) as error:
        asked(model, batch)
    assert "Custom gives no exact slopes" in str(error.value)
    assert "fwdlearn_tests.hidden.default has no forward derivative" in str(error.value)
    assert "Choose an estimator that needs losses alone" in str(error.value)


def test_torchs_own_forward_mode_alone_notices_what_is_hidden() -> None:
    with pytest.raises(UsageError, match="jvp: its slopes differ from differences of losses by"):
        asked(Custom(0.5).double(), features(4).to("cpu", torch.float64), "jvp")


def test_a_custom_operation_on_inputs_alone_is_no_obstacle() -> None:
    slopes, _ = asked(CustomOnInputs(1.0).double(), features(4).to("cpu", torch.float64))
    assert slopes.choice is not None and slopes.choice.rung == "dual"


def test_inside_a_function_without_derivatives_the_dual_goes_on() -> None:
    model, batch = OwnFunction().double(), features(4).to("cpu", torch.float64)
    slopes, found = asked(model, batch)
    family = Directions(Key.root(1), dict(slopes.params), 4)
    exact = by_differences(Engine(model, cross_entropy), batch, family)
    check(found, exact[DIRECTION, ROW], 1e-6)
    assert slopes.choice is not None and slopes.choice.rung == "dual"


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (Escaping, ["dual: __float__() takes a value out of torch", "jvp: "]),
        (Numpy, ["dual: numpy() takes a value out of torch", "jvp: "]),
    ],
)
def test_what_leaves_torch_is_refused(model: type[nn.Module], reasons: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        asked(model(), features(4))
    for reason in reasons:
        assert reason in str(error.value)


def test_objectives_without_slope_are_refused() -> None:
    with pytest.raises(UsageError, match="no tangent reaches the loss, or it has no slope"):
        asked(built("mlp"), features(4).to("cpu", torch.float64), objective=zero_one)


def test_an_error_of_the_models_own_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="shape '.3, 7.' is invalid"):
        asked(Broken(), features(4))


@pytest.mark.parametrize("name", list(CASES))
def test_torchs_own_forward_mode_is_the_next_rung(name: str) -> None:
    case = CASES[name]
    batch = case.batch(4).to("cpu", torch.float64)
    dual, fast = asked(built(name), batch, "dual", case.objective)
    jvp, slow = asked(built(name), batch, "jvp", case.objective)
    assert dual.choice is not None and dual.choice.rung == "dual"
    assert jvp.choice is not None and jvp.choice.rung == "jvp"
    check(slow, fast, 1e-10)


def test_a_wrong_rule_is_noticed_and_stepped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 1 part in 1000, which differences of float32 losses would not show."""
    shared = type(DUAL_RULES).shared

    def wrong(self: object, func: object) -> object:
        rule = shared(DUAL_RULES, func)
        if func is not F.layer_norm:
            return rule

        def changed(call, *args, **kwargs):
            out = rule(call, *args, **kwargs)
            return call.carry(out, call.tangent(out) * 1.01)

        return changed

    monkeypatch.setattr(type(DUAL_RULES), "shared", wrong)
    batch = features(4)
    slopes, found = asked(built("mlp", torch.float32), batch)
    assert slopes.choice is not None and slopes.choice.rung == "jvp"
    assert "dual: its slopes differ from those of jvp by" in slopes.choice.reason
    engine = Engine(built("mlp", torch.float32), cross_entropy)
    exact = by_jvp(engine, batch, Directions(Key.root(1), dict(engine.params), 4))
    check(found, exact[DIRECTION, ROW], 1e-5)


def test_a_batch_that_takes_another_path_is_traced_again() -> None:
    """A model may do something else with longer rows."""

    class Longer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.more = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x).tanh()
            return (self.more(x) if x.shape[1] > 6 else x).mean(1)[:, :5]

    engine = Engine(Longer().double(), cross_entropy)
    family = Directions(Key.root(1), dict(engine.params), 4)
    for length in (4, 9, 5):
        batch = series(4, length).to("cpu", torch.float64)
        exact = by_jvp(engine, batch, family)
        with torch.inference_mode():
            found = engine.slopes(batch, ROW, family, DIRECTION)[1]
        check(found, exact[DIRECTION, ROW], 1e-10)
    assert [choice.rung for choice in engine.exact.events] == ["dual"]


@pytest.mark.parametrize("model", [Mixing, Convolutions])
def test_rows_that_see_each_other_must_share_their_directions(model: type[nn.Module]) -> None:
    """Batch statistics in training mode, or anything else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model().double().train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    batch = (images if model is Convolutions else features)(4).to("cpu", torch.float64)
    engine = Engine(made, cross_entropy)
    family = Directions(Key.root(1), dict(engine.params), 4)
    exact = by_differences(engine, batch, family)
    slopes, found = asked(made, batch, shared=True)
    check(found, exact.flatten(), 1e-6)
    with pytest.raises(UsageError, match="set the allocator's sharing to 'shared'"):
        asked(made, batch)
    assert slopes.choice is not None
    assert slopes.choice.rung == ("jvp" if model is Convolutions else "dual")
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["mlp", "bert", "cnn", "tied"])
def test_how_passes_are_cut_changes_nothing_but_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    batch = case.batch(4).to("cpu", torch.float64)
    engine = Engine(built(name), case.objective)
    family = Directions(Key.root(1), dict(engine.params), 9)
    row, direction = torch.arange(4).repeat(9), torch.arange(9).repeat_interleave(4)
    answers, passes = [], []
    for budget in (None, 2**16, 1):
        for private in (False, True):
            slopes = Slopes(
                engine.model, engine.params, engine.row_losses, "dual", memory_budget=budget
            )
            counted: list[int] = []

            def counting(*args, counted=counted, cut=slopes_module.slope_passes, **more):
                for one in cut(*args, **more):
                    counted.append(one.query.numel())
                    yield one

            with torch.inference_mode(), monkeypatch.context() as patch:
                patch.setattr(slopes_module, "slope_passes", counting)
                some = torch.randperm(36, generator=torch.Generator().manual_seed(0))
                some = some if private else torch.arange(36)
                found = slopes(batch, row[some], family, direction[some])[1]
            answers.append(torch.empty_like(found).index_copy(0, some, found))
            passes.append(len(counted))
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-10, atol=1e-12)
    assert passes[-1] > passes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "bert", "llama", "cnn", "vit"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Slopes of the same weights in float64, to within the rounding of the dtype."""
    case, narrow = CASES[name], built(name, dtype)
    wide = built(name, torch.float64)
    wide.load_state_dict(narrow.state_dict())
    batch = case.batch(4).to("cpu", dtype)
    engine, reference = Engine(narrow, case.objective), Engine(wide, case.objective)
    family = Directions(Key.root(1), dict(engine.params), 4)
    exact = by_jvp(
        reference,
        batch.to("cpu", torch.float64),
        Directions(Key.root(1), dict(reference.params), 4),
    )
    with torch.inference_mode():
        found = engine.slopes(batch, ROW, family, DIRECTION)[1]
    assert found.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    check(found.double(), exact[DIRECTION, ROW], tolerance)
    assert engine.exact.choice is not None and engine.exact.choice.rung == "dual"


def test_dropout_masks_are_those_of_losses() -> None:
    torch.manual_seed(0)
    # Without a kink that a difference might step over.
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.4, "gelu", batch_first=True)
    head = [nn.Dropout1d(0.3), nn.Flatten(), nn.Dropout(0.2, inplace=True), nn.Linear(48, 5)]
    model = nn.Sequential(layer, *head).double().train()
    batch = CASES["encoder_layer"].batch(4).to("cpu", torch.float64)
    engine, key = Engine(model, cross_entropy), Key.root(3)
    family = Directions(Key.root(1), dict(engine.params), 4)
    state = torch.random.get_rng_state()
    exact = by_differences(engine, batch, family, key)
    check(by_jvp(engine, batch, family, key), exact, 1e-6, "reference")
    for private in (False, True):
        row, direction = queries(4, 4, private)
        with torch.inference_mode():
            losses, slopes = engine.slopes(batch, row, family, direction, key)
            again = engine.slopes(batch, row, family, direction, key)[1]
            clean = engine.losses(batch, row, dropout=key)
            other = engine.slopes(batch, row, family, direction, Key.root(4))[1]
        check(slopes, exact[direction, row], 1e-6, f"private={private}")
        torch.testing.assert_close(losses, clean, rtol=1e-12, atol=0)
        assert torch.equal(slopes, again) and not torch.allclose(slopes, other)
    assert engine.exact.choice is not None and engine.exact.choice.rung == "dual"
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("rung", ["dual", "jvp"])
@pytest.mark.parametrize("name", ["mlp", "bert", "cnn"])
def test_the_oracle_keeps_the_rules_of_asking(
    name: str, rung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries are counted, weights and generators untouched, also after an error."""
    case, model = CASES[name], built(name, torch.float32).train()
    calls = 0

    def objective(output: object, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls >= 100:
            raise RuntimeError("in the middle")
        return case.objective(output, targets)

    if name == "cnn":
        model.eval()
    monkeypatch.setattr(slopes_module, "SLOPE_RUNGS", (rung,))
    engine = Engine(model, objective)
    oracle = ModelOracle(engine, case.batch(4), Key.root(5))
    family = Directions(Key.root(1), oracle.params, 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    oracle.slopes(ROW, family, DIRECTION)
    losses, slopes = oracle.slopes(ROW[:3], family, DIRECTION[:3])
    assert oracle.queries == len(ROW) + 3
    assert losses.shape == slopes.shape == (3,)
    assert not losses.is_inference() and not slopes.requires_grad
    assert engine.exact.choice is not None and engine.exact.choice.rung == rung
    calls = 99
    with pytest.raises(RuntimeError, match="in the middle"):
        oracle.slopes(ROW, family, DIRECTION)
    assert oracle.queries == len(ROW) + 3
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_backward_pass_inside_the_model_is_refused() -> None:
    class Meta(nn.Module):
        """A gradient step of its own in every pass."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(10, 5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad(), torch.inference_mode(False):
                y = torch.ones(3, requires_grad=True)
                y.square().sum().backward()
            return self.inner(x)

    engine = Engine(Meta(), cross_entropy)
    oracle = ModelOracle(engine, features(4))
    with pytest.raises(BackwardError, match="a backward pass was asked for"):
        oracle.slopes(ROW, Directions(Key.root(1), oracle.params, 4), DIRECTION)


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="rung must be auto, dual or jvp, got 'quick'"):
        asked(built("mlp"), features(4), "quick")
    with pytest.raises(UsageError, match="dual: __float__.. takes a value out of torch"):
        asked(Escaping(), features(4), "dual")
