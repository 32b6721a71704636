"""Scales of quantised layers: what is trained is what the library's own tensors then say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.allocators import Uniform
from fwdlearn.batch import Batch
from fwdlearn.data import Data, DataInfo, Rows, corpus
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine.quantized import stored
from fwdlearn.errors import UsageError
from fwdlearn.estimators import SPSA, ForwardGradient, LikelihoodRatio
from fwdlearn.keys import Key
from fwdlearn.models import transformers
from fwdlearn.models.scales import Scaled, train_scales, write_scales, written
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle, forbid_backward
from fwdlearn.trainer import Trainer
from tests.engine.quantized_layers import (
    BlockLinear,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    dequantized,
    quantized,
)

ROW = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
DIRECTION = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 9])
INNER = ("0", "2")


def plain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5)
    return nn.Sequential(*layers).to(dtype).eval()


def own(layer: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    model = plain(dtype)
    for name in INNER:
        setattr(model, name, layer(model.get_submodule(name)))
    return model


def torchao(config: str, **settings: Any) -> nn.Module:
    library = pytest.importorskip("torchao.quantization")
    model = plain()
    made = getattr(library, config)(**settings)
    library.quantize_(model, made, lambda _, name: name in INNER)
    return model


def torchao_int4() -> nn.Module:
    library = pytest.importorskip("torchao.quantization.granularity")
    return torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=library.PerGroup(32)
    )


def bitsandbytes(kind: str, **settings: Any) -> nn.Module:
    library = pytest.importorskip("bitsandbytes")
    model = plain()
    for name in INNER:
        layer = model.get_submodule(name)
        sizes = layer.in_features, layer.out_features
        if kind == "int8":
            new = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            how = {"compute_dtype": torch.float32, "compress_statistics": False, **settings}
            new = library.nn.Linear4bit(*sizes, quant_type=kind, **how)
        new.load_state_dict(layer.state_dict())
        new.bias = layer.bias
        setattr(model, name, new.to("cpu").eval())
    return model


def quanto(kind: str) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    model = plain()
    library.quantize(model, weights=getattr(library, kind), include=list(INNER))
    library.freeze(model)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "int8": lambda: own(Int8Linear),
    "int4": lambda: own(Int4Linear),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
    "torchao int4": torchao_int4,
    "bitsandbytes int8": lambda: bitsandbytes("int8"),
    "bitsandbytes nf4": lambda: bitsandbytes("nf4"),
    "quanto int8": lambda: quanto("qint8"),
}
# Activations are rounded there too.
ROUGH = {"bitsandbytes int8": 4e-3}
every_model = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture(autouse=True)
def own_chance() -> Iterator[None]:
    """Libraries draw weights that they then throw away."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def rows(dtype: torch.dtype = torch.float32) -> Batch:
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Batch((x,), torch.arange(6) % 5)


def matrices(model: nn.Module) -> list[Tensor]:
    """Of the quantised layers, by running them on the identity."""
    found = []
    for name in INNER:
        layer: Any = model.get_submodule(name)
        bias, layer.bias = layer.bias, None
        layer.support_avx512bf16_for_cpu = False
        with torch.no_grad():
            found.append(layer(torch.eye(layer.in_features)).T.contiguous())
        layer.bias = bias
    return found


def reference(scaled: nn.Module, weights: list[Tensor], family: Directions, size: Tensor) -> Tensor:
    """Losses of queries, each of a dequantised model of its own."""
    batch, losses = rows(), []
    for row, number, step in zip(ROW, DIRECTION, size, strict=True):
        model: Any = plain()
        for name, weight in zip(INNER, weights, strict=True):
            direction = family.dense(f"{name}.factor", number.view(1))[0]
            factor = scaled.get_parameter(f"{name}.factor") + step * direction
            model.get_submodule(name).weight.copy_(weight * factor[:, None])
        one = batch.select(row.view(1))
        losses.append(cross_entropy(model(*one.args), one.targets))
    return torch.cat(losses)


def only_scales(model: nn.Module) -> list[str]:
    names = train_scales(model)
    for name, value in model.named_parameters():
        value.requires_grad_(name in names)
    return names


@every_model
@torch.no_grad()
def test_losses_are_those_of_the_dequantised_model_with_other_scales(name: str) -> None:
    model = MODELS[name]()
    weights = matrices(MODELS[name]())
    for layer in INNER:
        model.get_submodule(layer).support_avx512bf16_for_cpu = False
    before = model(*rows().args)
    assert only_scales(model) == ["0.factor", "2.factor"]
    allowed = ROUGH.get(name, 1e-4)
    torch.testing.assert_close(model(*rows().args), before, rtol=allowed, atol=allowed)
    model.get_parameter("0.factor").mul_(torch.linspace(0.5, 1.5, 64))
    found, size = [], torch.linspace(-1, 1, len(ROW), dtype=torch.float64)
    for rung in ("fold", "sequential"):
        engine = Engine(model, cross_entropy, rung)
        family = Directions(Key.root(1), dict(engine.params), 10)
        with torch.inference_mode():
            found.append(engine.losses(rows(), ROW, family, DIRECTION, size))
    torch.testing.assert_close(*found, rtol=allowed, atol=0)
    wanted = reference(model, weights, family, size)
    torch.testing.assert_close(found[0], wanted, rtol=allowed, atol=0)
    still = reference(model, weights, family, size * 0)
    assert float((wanted - still).abs().max()) > 10 * allowed


@every_model
@torch.no_grad()
def test_what_is_written_is_an_ordinary_layer_with_the_trained_scales(name: str) -> None:
    model = MODELS[name]()
    kinds, keys = [type(one) for one in model], list(model.state_dict())
    only_scales(model)
    for number, layer in enumerate(INNER):
        factor = model.get_parameter(f"{layer}.factor")
        factor.mul_(torch.linspace(0.5, 1.5, len(factor)).roll(number))
    held = [one.clone() for value in model.state_dict().values() for one in kept(value)]
    trained = model(*rows().args)
    allowed = ROUGH.get(name, 1e-5)
    with written(model):
        assert [type(one) for one in model] == kinds and list(model.state_dict()) == keys
        torch.testing.assert_close(model(*rows().args), trained, rtol=allowed, atol=allowed)
    assert isinstance(model.get_submodule("0"), Scaled)
    again = [one for value in model.state_dict().values() for one in kept(value)]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(again, held, strict=True))
    assert torch.equal(model(*rows().args), trained)
    write_scales(model)
    assert [type(one) for one in model] == kinds
    torch.testing.assert_close(model(*rows().args), trained, rtol=allowed, atol=allowed)


def kept(value: Any) -> list[Tensor]:
    return list(stored(value)) if isinstance(value, Tensor) else []


def bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("layer", [Int8Linear, Int4Linear])
def test_estimators_see_the_gradient_of_the_scales(layer: type[nn.Module]) -> None:
    model = own(layer, torch.float64)
    twin = copy.deepcopy(model)
    only_scales(model)
    batch, plan = rows(torch.float64), Plan.uniform(6, 4)
    # By autograd, of the scales of the dequantised matrices.
    truth = []
    matrix = dequantized(twin)
    factors = [torch.ones(n, 1, dtype=torch.float64, requires_grad=True) for n in (64, 32)]
    weights = [matrix.get_parameter(f"{n}.weight").detach() for n in INNER]
    call = {f"{n}.weight": f * w for n, f, w in zip(INNER, factors, weights, strict=True)}
    output = torch.func.functional_call(matrix, call, batch.args)
    cross_entropy(output, batch.targets).mean().backward()
    truth = [factor.grad.flatten() for factor in factors if factor.grad is not None]
    with forbid_backward():
        oracle = ModelOracle(Engine(model, cross_entropy), batch)
        # The factors are float32.
        family = Directions(Key.root(1), dict(oracle.params), 24)
        losses, slopes = oracle.slopes(plan.row, family, plan.direction)
        along = torch.zeros(24, dtype=torch.float64)
        for n, one in zip(INNER, truth, strict=True):
            along += family.dense(f"{n}.factor", torch.arange(24)).double() @ one
        assert oracle.left_out == {}
        for estimator in (SPSA(), ForwardGradient(), LikelihoodRatio()):
            made, _ = estimator.estimate(
                oracle, oracle.params, estimator.init(oracle.params), key=Key.root(0), plan=plan
            )
            assert all(0 < float(made.grad[n].norm()) < 1e3 for n in oracle.params)
    shared = Directions(Key.root(1), dict(oracle.params), 1)
    row = torch.arange(6)
    _, own_slopes = oracle.slopes(row, shared, row * 0)
    wanted = sum(
        shared.dense(f"{n}.factor", row[:1])[0].double() @ one
        for n, one in zip(INNER, truth, strict=True)
    )
    torch.testing.assert_close(own_slopes.double().mean(), wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["int8", "int4", "torchao int8", "bitsandbytes nf4"])
def test_steps_train_the_scales_and_nothing_else(name: str) -> None:
    model = MODELS[name]()
    only_scales(model)
    held = {n: [one.clone() for one in kept(value)] for n, value in model.state_dict().items()}
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    data = Data(DataInfo("features", (128,), 5), Rows(x, x[:, :5].argmax(1)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    training = Trainer(
        model, data, cross_entropy, SPSA(), Uniform(8), optimizer, batch_size=32, steps=40
    )
    start = training.evaluate(data.train)["loss"]
    assert training.train()["engine.rung"] == "fold"
    assert training.evaluate(data.train)["loss"] < start - 0.03
    for n, value in model.state_dict().items():
        same = all(torch.equal(bits(a), bits(b)) for a, b in zip(kept(value), held[n], strict=True))
        assert same == (not n.endswith(".factor")), n


def test_factors_stay_wide_in_short_dtypes() -> None:
    model = own(Int8Linear).to(torch.bfloat16)
    only_scales(model)
    assert model.get_parameter("0.factor").dtype == torch.float32
    assert model(*rows(torch.bfloat16).args).dtype == torch.bfloat16
    assert Engine(model, cross_entropy).choose(rows(torch.bfloat16)).rung == "fold"


def test_scales_that_no_factor_fits_into_are_refused_with_a_way_out() -> None:
    with pytest.raises(
        UsageError,
        match=r"the scales of 0 \(BlockLinear\) cannot be trained: a scale of scale \[32\] does "
        r"not belong to one of its 64 outputs. Leave that layer out, train adapters instead",
    ):
        train_scales(own(BlockLinear))
    with pytest.raises(UsageError, match=r"0 \(PackedLinear\) .*: it keeps none by a name that is"):
        train_scales(quantized(plain(), PackedLinear))
    model = own(Int8Linear)
    with pytest.raises(UsageError, match=r"'7' matches no quantised layer; the first are 0, 2\."):
        train_scales(model, ["0", "7"])
    with pytest.raises(UsageError, match=r"'\*' matches no quantised layer; the first are none"):
        train_scales(plain())
    model[2] = nn.Sequential(nn.Linear(64, 128), twin := Int8Linear(nn.Linear(128, 64)))
    twin.weight = model[0].weight
    with pytest.raises(UsageError, match="several layers share them"):
        train_scales(model)
    # Nothing has been changed on the way.
    assert isinstance(model[0], Int8Linear) and model[0].bias is not None


def test_one_layer_in_two_places_stays_one() -> None:
    layer = Int8Linear(nn.Linear(8, 8))
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(3, 8)
    before = model(x)
    assert train_scales(model) == ["0.factor"] and model[0] is model[2]
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model.get_parameter("0.factor").mul_(2)
        trained = model(x)
        with written(model):
            assert model[0] is layer and model[2] is layer
            torch.testing.assert_close(model(x), trained)


@pytest.mark.parametrize(
    ("kind", "settings"), [("nf4", {"compress_statistics": True}), ("fp4", {})]
)
def test_forms_of_bitsandbytes_that_cannot_be_trained(kind: str, settings: Any) -> None:
    model = bitsandbytes(kind, **settings)
    if settings:
        with pytest.raises(UsageError, match="without double quantisation they can be"):
            train_scales(model)
    else:
        library = pytest.importorskip("bitsandbytes")
        # A block of 64 weights goes over the end of a row of 96.
        model = nn.Sequential(library.nn.Linear4bit(96, 64, compress_statistics=False).to("cpu"))
        with pytest.raises(UsageError, match=r"weight.absmax \[96\] does not belong to one of its"):
            train_scales(model)


def llama(folder: Path, kind: str) -> Path:
    library = pytest.importorskip("transformers")
    from tests.models.language_models import TEXTS, causal_folder

    causal_folder(folder / "plain", TEXTS)
    if kind == "torchao":
        settings = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
        config = library.TorchAoConfig(settings)
    else:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("accelerate")
        how = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True}
        config = library.BitsAndBytesConfig(**how, bnb_4bit_quant_type="nf4")
    sizes = library.LlamaConfig.from_pretrained(
        folder / "plain",
        hidden_size=64,
        intermediate_size=128,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    library.LlamaForCausalLM(sizes).save_pretrained(folder / "plain")
    model = library.AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(folder / kind)
    tokenizer = library.AutoTokenizer.from_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / kind)
    return folder / kind


@pytest.mark.parametrize("kind", ["torchao", "int8", "nf4"])
def test_a_quantised_model_of_transformers_is_saved_as_one(kind: str, tmp_path: Path) -> None:
    folder = llama(tmp_path, kind)
    (tmp_path / "t.txt").write_text("It was great. Or terrible, or both? " * 20, "utf-8")
    data = corpus(tmp_path / "t.txt", tokens=9)
    built = transformers(data.info, folder, train_scales=("*mlp*",))
    batch = data.prepared(built.processor).train.batch(torch.arange(3))
    trained = [name for name, value in built.module.named_parameters() if value.requires_grad]
    assert len(trained) == 6 and all(name.endswith("_proj.factor") for name in trained)
    with torch.no_grad():
        before = built.module(**batch.kwargs)
        for name in trained:
            factor = built.module.get_parameter(name)
            factor.mul_(torch.linspace(0.5, 1.5, len(factor)))
        ours = built.module(**batch.kwargs)
        assert built.save is not None
        built.save(tmp_path / "out")
        assert torch.equal(built.module(**batch.kwargs), ours)
        theirs = transformers(data.info, tmp_path / "out").module
        for module in theirs.modules():
            # Else bitsandbytes rounds scales of four bits in its first pass on some processors.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        found = theirs(**batch.kwargs)
    allowed = 5e-3 if kind == "int8" else 1e-4
    torch.testing.assert_close(found, ours, rtol=allowed, atol=allowed)
    assert float((ours - before).abs().max()) > 10 * allowed
    assert {type(one) for one in theirs.modules()} >= {type(built.module.model)}
    with pytest.raises(
        UsageError, match=r"train_scales=...\) and lora exclude each other; leave one"
    ):
        transformers(data.info, folder, train_scales=("*",), lora=2)
