"""Quantised layers: what they hold is perturbed without being touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.allocators import Uniform
from fwdlearn.batch import Batch
from fwdlearn.data import Data, DataInfo, Rows
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine.quantized import is_quantized, quantized_layers
from fwdlearn.errors import UsageError
from fwdlearn.estimators import SPSA, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.oracle import ModelOracle
from fwdlearn.trainer import Trainer

from .models import CASES, cross_entropy, features, series
from .quantized_layers import Int8Linear, PackedLinear, dequantized, quantized

ROW = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
DIRECTION = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 9])
KINDS = [("rademacher", 1), ("gaussian", 2), ("rademacher", None)]
LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "scaled after": (Int8Linear, {}),
    "written out": (Int8Linear, {"written_out": True}),
    "packed": (PackedLinear, {}),
}


class Mixer(nn.Module):
    """Tokens before rows and after them, one layer used twice, values overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x = self.norm(x + self.twice(input=x)).transpose(0, 1)
        return self.head(self.twice(x).mean(0))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 12), nn.Tanh(),
        nn.Linear(12, 5),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "mlp": (mlp, features),
    "mixer": (Mixer, series),
    "vit": (CASES["vit"].build, CASES["vit"].batch),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name][0]().to(dtype).eval()


def rows(name: str, dtype: torch.dtype = torch.float64) -> Batch:
    return MODELS[name][1](6).to("cpu", dtype)


def answers(engine: Engine, batch: Batch, law: str = "rademacher", rank: int | None = 1) -> Tensor:
    """Of every kind of question: private, shared and repeated rows, both signs."""
    family = Directions(Key.root(1), dict(engine.params), 10, law, rank)
    scale = torch.linspace(-0.03, 0.03, len(ROW), dtype=torch.float64)
    shared = torch.arange(6).repeat(3), torch.arange(3).repeat_interleave(6)
    with torch.inference_mode():
        return torch.cat(
            [
                engine.losses(batch, ROW, family, DIRECTION, scale),
                engine.losses(batch, shared[0], family, shared[1], 0.02),
                engine.losses(batch, torch.arange(6), family, torch.zeros(6).long(), -0.02),
                engine.losses(batch, ROW),
            ]
        )


@pytest.mark.parametrize("rung", ["fold", "copies", "sequential"])
@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("name", list(MODELS))
def test_losses_are_those_of_the_dequantised_model(name: str, kind: str, rung: str) -> None:
    layer, settings = LAYERS[kind]
    model = quantized(made(name), layer, **settings)
    plain, batch = dequantized(model), rows(name)
    if rung == "copies" and layer is PackedLinear:
        pytest.skip("the kernel has no rule for copies")
    engine = Engine(model, cross_entropy, rung, virtual=["*"])
    assert len(engine.quantized.weights) > 1
    reference = Engine(plain, cross_entropy, "sequential")
    assert list(engine.params) == list(reference.params)
    for law, rank in KINDS[: 1 if name == "vit" else None]:
        one, other = answers(engine, batch, law, rank), answers(reference, batch, law, rank)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
    folded = Engine(plain, cross_entropy, "fold")
    torch.testing.assert_close(answers(folded, batch), answers(engine, batch), rtol=1e-10, atol=0)
    # The comparison means something only if the matrices are perturbed.
    frozen = Engine(model, cross_entropy, rung)
    assert (answers(frozen, batch) - answers(engine, batch))[:10].abs().median() > 1e-4


@pytest.mark.parametrize("name", list(MODELS))
def test_each_virtual_weight_is_perturbed_where_it_is_used(name: str) -> None:
    model, batch = quantized(made(name)), rows(name)
    plain = dequantized(model).requires_grad_(False)
    for weight in quantized_layers(model):
        engine = Engine(model.requires_grad_(False), cross_entropy, virtual=[weight])
        assert list(engine.params) == [weight]
        plain.get_parameter(weight).requires_grad_(True)
        reference = Engine(plain, cross_entropy, "sequential")
        one, other = answers(engine, batch), answers(reference, batch)
        plain.requires_grad_(False)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0, msg=weight)
        assert (one[:10] - one[-10:]).abs().median() > 1e-5, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "mixer"])
def test_short_dtypes(name: str, dtype: torch.dtype) -> None:
    """To within the rounding of the dtype, the truth of the same integers in float64."""
    model, batch = quantized(made(name, dtype)), rows(name, dtype)
    wide = copy.deepcopy(model).double()
    one = answers(Engine(model, cross_entropy, "fold", virtual=["*"]), batch)
    two = answers(Engine(model, cross_entropy, "sequential", virtual=["*"]), batch)
    truth = answers(
        Engine(wide, cross_entropy, "sequential", virtual=["*"]), batch.to("cpu", torch.float64)
    )
    allowed = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    for losses in (one, two):
        torch.testing.assert_close(losses.double(), truth, rtol=allowed, atol=allowed)


def test_nothing_is_written_and_everything_is_put_back() -> None:
    """After answers on every rung, and after an error in the middle."""
    calls, limit = 0, 10**9

    def objective(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise RuntimeError("in the middle")
        return cross_entropy(output, targets)

    for layer in (Int8Linear, PackedLinear):
        model, batch = quantized(made("mlp", torch.float32), layer), rows("mlp", torch.float32)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        order = [name for name, _ in model.named_parameters()], list(before)
        inside = [dict(module.__dict__) for module in model.modules()]
        packed = [module.packed[0] for module in model if isinstance(module, PackedLinear)]
        codes = [layer.weight.clone() for layer in packed]
        for rung in ("auto", "sequential"):
            for limit in (10**9, 9):
                calls, engine = 0, Engine(model, objective, rung, virtual=["*"])
                if limit == 9:
                    with pytest.raises(RuntimeError, match="in the middle"):
                        for _ in range(9):
                            answers(engine, batch)
                else:
                    answers(engine, batch)
                after = model.state_dict()
                assert order == ([name for name, _ in model.named_parameters()], list(after))
                for key, value in after.items():
                    assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
                for module, had in zip(model.modules(), inside, strict=True):
                    assert module.__dict__.keys() == had.keys()
                    assert not module._forward_pre_hooks
        for one, module in zip(
            codes, (m for m in model if isinstance(m, PackedLinear)), strict=True
        ):
            assert torch.equal(one, module.packed[0].weight)


def test_a_virtual_weight_takes_no_memory() -> None:
    model = nn.Sequential(Int8Linear(nn.Linear(512, 512)))
    params = Engine(model, cross_entropy, virtual=["*"]).params
    assert params["0.weight"].shape == (512, 512) and params["0.weight"].dtype == torch.float32
    assert params["0.weight"].untyped_storage().nbytes() == 4


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("virtual", [(), ("*",)])
def test_scales_that_are_parameters_are_perturbed(
    virtual: tuple[str, ...], written_out: bool
) -> None:
    batch = rows("mlp")
    model = quantized(made("mlp"), Int8Linear, trained=True, written_out=written_out)
    size = {name: 1e-3 for name in Engine(model, cross_entropy).params if "scale" in name}
    assert len(size) == 3
    losses = []
    for rung in ("fold", "sequential"):
        engine = Engine(model, cross_entropy, rung, virtual=virtual)
        family = Directions(Key.root(1), dict(engine.params), 10, scales=size)
        with torch.inference_mode():
            losses.append(engine.losses(batch, ROW, family, DIRECTION, 0.03))
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    alone = Engine(model.requires_grad_(False), cross_entropy, virtual=("*",))
    assert len(alone.params) == 3
    for name in size:
        model.get_parameter(name).requires_grad_(True)
    seen = Engine(model, cross_entropy)
    family = Directions(Key.root(1), dict(seen.params), 10)
    with torch.inference_mode():
        change = seen.losses(batch, ROW, family, DIRECTION, 3e-5) - seen.losses(batch, ROW)
    assert change.abs().min() > 1e-5


@pytest.mark.parametrize("estimator", [SPSA(), RandomPerturbation(sigma=0.01, rank=None)])
def test_estimates_are_those_of_the_dequantised_matrices(estimator: Any) -> None:
    model = quantized(made("mlp"))
    plan, _ = Uniform(4).allocate(6, {}, None, key=Key.root(2))
    estimates = []
    for one, virtual in ((model, ["*"]), (dequantized(model), [])):
        oracle = ModelOracle(Engine(one, cross_entropy, virtual=virtual), rows("mlp"))
        estimate, _ = estimator.estimate(oracle, oracle.params, None, key=Key.root(1), plan=plan)
        estimates.append({name: estimate.grad[name] for name in estimate.grad})
    assert estimates[0].keys() == estimates[1].keys() >= {"0.weight", "0.bias", "3.weight"}
    for name, gradient in estimates[0].items():
        torch.testing.assert_close(gradient, estimates[1][name], rtol=1e-6, atol=1e-9)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("name", ["mlp", "mixer"])
def test_exact_slopes_are_those_of_the_dequantised_model(name: str, kind: str) -> None:
    layer, settings = LAYERS[kind]
    model = quantized(made(name), layer, **settings)
    slopes = []
    for one, virtual in ((model, ["*"]), (dequantized(model), [])):
        engine = Engine(one, cross_entropy, virtual=virtual)
        family = Directions(Key.root(1), dict(engine.params), 10)
        with torch.inference_mode():
            private = engine.slopes(rows(name), ROW, family, DIRECTION)
            shared = engine.slopes(rows(name), torch.arange(6), family, torch.zeros(6).long())
        assert engine.exact.choice is not None and engine.exact.choice.rung == "dual"
        slopes.append(torch.cat([*private, *shared]))
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "mixer"])
def test_gradients_from_activations_are_those_of_the_dequantised_model(name: str) -> None:
    model = quantized(made(name))
    gradients = []
    for one, virtual in ((model, ["*"]), (dequantized(model), [])):
        oracle = ModelOracle(Engine(one, cross_entropy, virtual=virtual), rows(name))
        generator = torch.Generator().manual_seed(0)
        assert not oracle.left_out
        sites = {name.partition("#")[0]: site for name, site in oracle.sites.items()}
        cotangents = {
            site: torch.randn(6, *output.shape, generator=generator, dtype=torch.float64)
            for site, output in sorted(oracle.sites.items())
        }
        assert "head.weight" in sites or "5.weight" in sites or "5.bias" in sites
        gradients.append(oracle.gather(cotangents))
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key], rtol=1e-10, atol=1e-12)


def test_a_compiled_pass_gives_the_same_losses() -> None:
    model, batch = quantized(made("mlp")), rows("mlp")
    engine = Engine(model, cross_entropy, "fold", compile="eager", virtual=["*"])
    one = answers(engine, batch)
    assert (
        engine.compiled is not None and engine.compiled.refusal is None and engine.compiled.graphs
    )
    plain = answers(Engine(model, cross_entropy, "fold", virtual=["*"]), batch)
    torch.testing.assert_close(one, plain, rtol=1e-10, atol=0)


class Adapted(nn.Module):
    """A frozen quantised layer with a low-rank adapter beside it, as adapters are wrapped."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Linear(self.in_features, rank, bias=False)
        self.up = nn.Linear(rank, self.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def data() -> Data:
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    return Data(DataInfo("features", (10,), 5), Rows(x, x[:, :5].argmax(1)))


def trainer(model: nn.Module, lr: float = 0.05, **settings: Any) -> Trainer:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    estimator = SPSA(**settings)
    return Trainer(
        model, data(), cross_entropy, estimator, Uniform(8), optimizer, batch_size=32, steps=60
    )


@pytest.mark.parametrize("layer", [Int8Linear, PackedLinear])
def test_what_is_in_floating_point_is_trained_and_nothing_else(layer: type[nn.Module]) -> None:
    """An adapter, biases and gains on a quantised base: the loss falls, the base stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = quantized(made("mlp", torch.float32), layer)
        model[3] = Adapted(model[3])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        training = trainer(model)
        start = training.evaluate(training.data.train)["loss"]
        summary = training.train()
    assert summary["engine.rung"] == "fold"
    assert training.evaluate(training.data.train)["loss"] < 0.9 * start
    trained = set(training.engine.params)
    assert {"2.weight", "3.down.weight", "3.up.weight"} <= trained
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in trained), key


def test_scales_are_trained() -> None:
    model = quantized(made("mlp", torch.float32), Int8Linear, trained=True).requires_grad_(False)
    for module in model:
        if isinstance(module, Int8Linear):
            module.scale.requires_grad_(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = trainer(model, lr=1e-4, scales={"*.scale": 1e-2})
    start = training.evaluate(training.data.train)["loss"]
    training.train()
    assert training.evaluate(training.data.train)["loss"] < start - 0.05
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ("scale" not in key), key


def test_training_what_no_update_can_change_is_refused_with_a_way_out() -> None:
    model = quantized(made("mlp", torch.float32)).requires_grad_(False)
    message = (
        "Sequential has no trainable parameter; set requires_grad on those that training may "
        "change. 0.weight is quantised, and no update can be written into its few bits: set its "
        "requires_grad to False and train an adapter"
    )
    with pytest.raises(UsageError, match=message):
        Engine(model, cross_entropy)
    eight_bits = nn.Linear(4, 4)
    eight_bits.weight = nn.Parameter(eight_bits.weight.detach().to(torch.float8_e4m3fn))
    with pytest.raises(UsageError, match=r"weight requires a gradient but is quantised: no update"):
        Engine(eight_bits, cross_entropy)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    model = quantized(made("mlp", torch.float32))
    with pytest.raises(
        UsageError, match=r"'7\.\*' matches no weight .* there are 0.weight, 3.weight"
    ):
        Engine(model, cross_entropy, virtual=["0.*", "7.*"])
    with pytest.raises(UsageError, match=r"'\*' matches no weight .* there are none"):
        Engine(made("mlp"), cross_entropy, virtual=["*"])


class Reading(nn.Module):
    """Multiplies with what a layer holds, instead of running the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Int8Linear(nn.Linear(10, 8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.layer.weight.to(x.dtype) * self.layer.scale[:, None]))


class Rectified(Int8Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_layers_that_cannot_be_perturbed_are_refused() -> None:
    batch, row = features(4), torch.arange(4)
    engine = Engine(Reading(), cross_entropy, virtual=["*"])
    with pytest.raises(UsageError, match=r"does not run its quantised layers \(layer.weight\)"):
        engine.losses(batch, row)
    model = nn.Sequential(Rectified(nn.Linear(10, 8)), nn.Linear(8, 5))
    engine = Engine(model, cross_entropy, virtual=["*"])
    with pytest.raises(UsageError, match="Rectified is not linear in its input, so its output"):
        engine.losses(batch, row)
    # Where its matrix is not perturbed, it may be what it likes.
    seen = Engine(model, cross_entropy)
    torch.testing.assert_close(
        seen.losses(batch, row), cross_entropy(model(*batch.args), batch.targets)
    )
    reference = Engine(model, cross_entropy, "sequential")
    torch.testing.assert_close(answers(seen, features(6)), answers(reference, features(6)))


def test_batch_statistics_are_left_alone() -> None:
    model = nn.Sequential(
        Rectified(nn.Linear(10, 8)), nn.BatchNorm1d(8), Int8Linear(nn.Linear(8, 5))
    ).double()
    before = {name: value.clone() for name, value in model.named_buffers()}
    twin = nn.Sequential(model[0], model[1], *dequantized(nn.Sequential(model[2])))
    batch, row = features(6).to("cpu", torch.float64), torch.arange(6)
    losses = []
    for one, virtual in ((model, ["2.weight"]), (twin, [])):
        engine = Engine(one.train(), cross_entropy, virtual=virtual)
        family = Directions(Key.root(1), dict(engine.params), 1)
        losses.append(engine.losses(batch, row, family, torch.zeros(6).long(), 0.1))
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_layers_are_told_by_what_they_hold() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))

    class Thin(nn.Module):
        in_features, out_features = 8, 8

        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Parameter(torch.ones(8, 1)) for _ in range(2))

    class Grouped(nn.Module):
        in_features, out_features = 8, 8

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.zeros(8, 4, dtype=torch.uint8))
            self.scale = nn.Parameter(torch.ones(8, 2))

    shared = Int8Linear(nn.Linear(4, 4))
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "masked": Masked(),
            "thin": Thin(),
            "embedding": nn.Embedding(4, 4),
            "grouped": Grouped(),
            "z": shared,
            "a": shared,
            "adapted": Adapted(Int8Linear(nn.Linear(4, 4))),
            "packed": PackedLinear(nn.Linear(4, 4)),
        }
    )
    names = {"grouped.weight", "a.weight", "adapted.base.weight", "packed.weight"}
    assert set(quantized_layers(model)) == names
    assert is_quantized(torch.zeros(1, dtype=torch.float8_e5m2))
    assert not is_quantized(torch.zeros(1, dtype=torch.bfloat16))
