"""The layers of torchao and bitsandbytes, where those are installed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocators import Uniform
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine.quantized import quantized_layers
from fwdlearn.errors import UsageError
from fwdlearn.estimators import SPSA
from fwdlearn.keys import Key
from fwdlearn.oracle import ModelOracle

from .models import cross_entropy, features

ROW = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
DIRECTION = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 9])
INNER = ("0", "3")


def plain() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(64, 96), nn.Tanh(), nn.LayerNorm(96), nn.Linear(96, 64), nn.ReLU(),
            nn.Linear(64, 5),
        )  # fmt: skip


def torchao(config: str) -> nn.Module:
    library = pytest.importorskip("torchao.quantization")
    if not hasattr(library, config):
        pytest.skip(f"this torchao has no {config}")
    model = plain()
    library.quantize_(model, getattr(library, config)(), lambda _, name: name in INNER)
    return model


def bitsandbytes(kind: str) -> nn.Module:
    library = pytest.importorskip("bitsandbytes")
    model = plain()
    for name in INNER:
        layer = model.get_submodule(name)
        sizes = layer.in_features, layer.out_features
        if kind == "int8":
            replaced = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            replaced = library.nn.Linear4bit(*sizes, quant_type=kind, compute_dtype=torch.float32)
        replaced.load_state_dict(layer.state_dict())
        replaced.bias = layer.bias
        # Moving it quantises it.
        setattr(model, name, replaced.to("cpu"))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8, activations too": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
    "bitsandbytes int8": lambda: bitsandbytes("int8"),
    "bitsandbytes nf4": lambda: bitsandbytes("nf4"),
    "bitsandbytes fp4": lambda: bitsandbytes("fp4"),
}
# Where activations are quantised too, a matrix that is computed with is not one that is linear.
ROUGH = {"torchao int8, activations too": 2e-2, "bitsandbytes int8": 2e-2}
every_model = pytest.mark.parametrize("name", list(MODELS))


def built(name: str) -> nn.Module:
    try:
        return MODELS[name]()
    except ImportError as error:
        pytest.skip(str(error))


def dequantized(model: nn.Module) -> nn.Module:
    """Matrices by running the layers on the identity."""
    model = copy.deepcopy(model)
    for name in INNER:
        layer = model.get_submodule(name)
        bias, layer.bias = layer.bias, None
        replaced = nn.Linear(layer.in_features, layer.out_features)
        with torch.no_grad():
            replaced.weight.copy_(layer(torch.eye(layer.in_features)).T)
        replaced.bias = bias
        setattr(model, name, replaced)
    return model


def stored(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a model holds, those inside of tensors too."""
    for value in model.state_dict().values():
        if hasattr(value, "__tensor_flatten__"):
            yield from (getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, Tensor):
            yield value


def answers(engine: Engine, batch: Batch, family: Directions) -> Tensor:
    scale = torch.linspace(-0.03, 0.03, len(ROW), dtype=torch.float64)
    with torch.inference_mode():
        shared = engine.losses(batch, torch.arange(6), family, torch.zeros(6).long(), 0.02)
        return torch.cat([engine.losses(batch, ROW, family, DIRECTION, scale), shared])


@every_model
def test_losses_move_as_those_of_the_dequantised_model(name: str) -> None:
    model, batch = built(name), features(6, 64)
    with torch.inference_mode():
        # What a library does to itself on its first pass is done now.
        model(*batch.args)
    before = [value.clone() for value in stored(model)]
    assert set(quantized_layers(model)) == {"0.weight", "3.weight"}
    engine = Engine(model, cross_entropy, "fold", virtual=["*"])
    family = Directions(Key.root(1), dict(engine.params), 10)
    one = answers(engine, batch, family)
    reference = Engine(model, cross_entropy, "sequential", virtual=["*"])
    allowed = ROUGH.get(name, 1e-4)
    torch.testing.assert_close(one, answers(reference, batch, family), rtol=allowed, atol=0)
    twin = Engine(dequantized(model), cross_entropy, "fold")
    assert list(twin.params) == list(engine.params)
    torch.testing.assert_close(one, answers(twin, batch, family), rtol=allowed, atol=0)
    # The matrices do move the losses, by far more than that.
    frozen = Engine(model, cross_entropy, "fold")
    assert (answers(frozen, batch, family) - one).abs().max() > 10 * allowed
    for value, had in zip(stored(model), before, strict=True):
        assert torch.equal(value.view(torch.uint8), had.view(torch.uint8))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ROUGH])
def test_estimates_and_exact_slopes(name: str) -> None:
    model, batch = built(name), features(6, 64)
    plan, _ = Uniform(4).allocate(6, {}, None, key=Key.root(2))
    found = []
    for one, virtual in ((model, ["*"]), (dequantized(model), [])):
        engine = Engine(one, cross_entropy, virtual=virtual)
        oracle = ModelOracle(engine, batch)
        parts = (oracle, oracle.params, None)
        estimate, _ = SPSA(sigma=0.03).estimate(*parts, key=Key.root(1), plan=plan)
        family = Directions(Key.root(1), dict(engine.params), 10)
        _, slopes = oracle.slopes(ROW, family, DIRECTION)
        assert engine.exact.choice is not None and engine.exact.choice.rung == "dual"
        found.append((estimate.grad["0.weight"], estimate.grad["0.bias"], slopes))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_a_quantised_parameter_that_requires_a_gradient_is_refused() -> None:
    model: Any = torchao("Int8WeightOnlyConfig")
    model[0].weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"0.weight requires a gradient but is quantised: no upd"):
        Engine(model, cross_entropy)
