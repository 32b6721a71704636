"""Scales of quantised layers, trained as one factor for each output.

A quantised layer makes `x (s C).T + bias` of integers C and scales s. No small step fits into C,
but outputs can be multiplied: `x (f s C).T = f (x (s C).T)` with a factor f of each output, as long
as a scale belongs to one output, be there one of them or one for each group of inputs. So a
perturbed scale costs a product with what the layer puts out and no dequantised copy. What is
trained is relative to what the library has found: f is 1 at first. When a model is saved, f goes
into the library's own tensor, and what is saved is an ordinary quantised model.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fwdlearn.engine.quantized import is_quantized, matrix_dtype, quantized_layers
from fwdlearn.errors import UsageError

# As torchao, optimum-quanto, bitsandbytes and layers of GPTQ and AWQ call them.
_SCALES = ("scale", "_scale", "scales", "weight_scale", "SCB", "absmax")
_OFFSETS = ("zero_point", "_shift", "zeros")
_PACKING = "support_avx512bf16_for_cpu"
Way = tuple[tuple[str, ...], Callable[[Tensor, Tensor], Tensor]]


class Scaled(nn.Module):
    """A quantised layer whose outputs are multiplied.

    Args:
        layer: the layer; its bias moves here.

    Attributes:
        factor: [out_features], float32 whatever the layer computes in, so that small updates count.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.bias = layer, layer.bias
        layer.bias = None
        device = next((value.device for value in _held(layer).values()), None)
        self.factor = nn.Parameter(torch.ones(layer.out_features, device=device))

    @property
    def weight(self) -> Any:
        """Of the layer: models ask for its dtype."""
        return self.layer.weight

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.layer(input)
        scaled = output * self.factor
        return (scaled if self.bias is None else scaled + self.bias).to(output.dtype)


def train_scales(model: nn.Module, patterns: Sequence[str] = ("*",)) -> list[str]:
    """Gives quantised layers a trained factor of each output, in place.

    What the layers hold is frozen; the rest of the model is left as it is.

    Args:
        model: with layers of torchao, bitsandbytes or optimum-quanto, or others that have
            `in_features`, `out_features`, integers and scales.
        patterns: of the names of quantised layers.

    Returns:
        The names of the new parameters.

    Raises:
        UsageError: a pattern matches no quantised layer, or a factor of each output cannot be
            written into the scales of one.
    """
    found = {name.removesuffix(".weight"): users for name, users in quantized_layers(model).items()}
    for pattern in patterns:
        if not fnmatch.filter(found, pattern):
            first = ", ".join(list(found)[:3]) or "none"
            raise UsageError(
                f"train_scales: the pattern {pattern!r} matches no quantised layer; the first are "
                f"{first}. Weights in floating point are trained themselves, by model.train."
            )
    chosen = {n: found[n] for n in found if any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    for module in model.modules():
        # Of four bits: on some processors bitsandbytes rearranges in its first pass what it holds,
        # and does not put all of it back when it saves.
        if hasattr(module, _PACKING):
            setattr(module, _PACKING, False)
    for name, (layer, *others) in chosen.items():
        if others:
            raise _refusal(name, layer, "several layers share them")
        with _bare(layer):
            _way(name, layer, matrix_dtype(layer, model))
    new = {id(layer): Scaled(layer.requires_grad_(False)) for (layer,) in chosen.values()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in new:
            _put(model, path, new[id(module)])
    return [f"{name}.factor" for name in chosen]


@contextmanager
def written(model: nn.Module) -> Iterator[None]:
    """Within, the layers are the library's own, and their scales are the trained ones.

    Afterwards everything is as before, bit for bit. A scale keeps its dtype, and is rounded to it.
    """
    with ExitStack() as undo:
        _write(model, undo)
        yield


def write_scales(model: nn.Module) -> None:
    """As `written`, for good: the model is again as its library made it, but for its scales."""
    with ExitStack() as undo:
        _write(model, undo)
        undo.pop_all()


@torch.no_grad()
def _write(model: nn.Module, undo: ExitStack) -> None:
    done: set[int] = set()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, Scaled):
            continue
        layer: Any = module.layer
        if id(module) not in done:
            done.add(id(module))
            way = _way(path, layer, matrix_dtype(layer, model))
            for value, before in _multiply(layer, way, module.factor.detach()):
                undo.callback(value.copy_, before)
            undo.callback(setattr, layer, "bias", None)
            layer.bias = module.bias
        undo.callback(_put, model, path, module)
        _put(model, path, layer)


def _held(layer: Any) -> dict[str, Tensor]:
    """Name -> tensor of scales or of offsets, wherever a library keeps them."""
    weight = getattr(layer, "weight", None)
    holders = {
        "": layer,
        "weight.": weight,
        "weight.quant_state.": getattr(weight, "quant_state", None),
        "state.": getattr(layer, "state", None),
    }
    named = {
        f"{place}{name}": getattr(holder, name, None)
        for place, holder in holders.items()
        for name in (*_SCALES, *_OFFSETS)
    }
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@torch.no_grad()
def _way(name: str, layer: Any, dtype: torch.dtype) -> Way:
    """Which tensors of a layer without bias to multiply, and how: what its outputs follow."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise _refusal(
            name,
            layer,
            "a pass has packed them for this processor, and bitsandbytes cannot undo that; call "
            "train_scales before it",
        )
    chance = torch.Generator().manual_seed(0)
    probe = torch.randn(4, layer.in_features, generator=chance)
    device = next((value.device for value in _held(layer).values()), None)
    probe = probe.to(device, dtype)
    # Libraries settle where things are in the first pass.
    output = layer(probe).float()
    held = _held(layer)
    scales = tuple(place for place in held if place.rpartition(".")[2] in _SCALES)
    if not scales:
        raise _refusal(name, layer, "it keeps none by a name that is known")
    if double := next((place for place in scales if is_quantized(held[place])), None):
        raise _refusal(
            name, layer, f"{double} is itself quantised; without double quantisation they can be"
        )
    # Powers of two are exact in every dtype of a scale.
    factor = torch.exp2((torch.arange(layer.out_features, device=device) % 3 - 1).float())
    wanted = output * factor
    offsets = tuple(p for p in held if p not in scales and held[p].is_floating_point())
    for way in product((scales, scales + offsets), (_of_row, _of_column)):
        found = _tried(layer, way, factor, probe)
        if found is not None and torch.allclose(
            found, wanted, 1e-2, 1e-2 * float(wanted.abs().max())
        ):
            return way
    raise _refusal(
        name,
        layer,
        f"a scale of {scales[0]} {list(held[scales[0]].shape)} does not belong to one of its "
        f"{layer.out_features} outputs",
    )


def _tried(layer: Any, way: Way, factor: Tensor, probe: Tensor) -> Tensor | None:
    """What the layer would put out, or None where its scales have no such shape."""
    try:
        before = _multiply(layer, way, factor)
    except RuntimeError:
        return None
    try:
        return layer(probe).float()
    finally:
        for value, was in before:
            value.copy_(was)


@torch.no_grad()
def _multiply(layer: Any, way: Way, factor: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Multiplies in place; the tensors, and what they were."""
    places, layout = way
    held = _held(layer)
    new = [(held[place], layout(held[place], factor)) for place in places]
    if any(value.shape != changed.shape for value, changed in new):
        raise RuntimeError("other shapes")
    before = [(value, value.clone()) for value, _ in new]
    for value, changed in new:
        value.copy_(changed)
    return before


def _of_row(value: Tensor, factor: Tensor) -> Tensor:
    """Scales of an output beside each other, whatever the shape."""
    return (value.reshape(len(factor), -1).float() * factor.unsqueeze(1)).reshape(value.shape)


def _of_column(value: Tensor, factor: Tensor) -> Tensor:
    """Scales [groups, out_features]."""
    return value.float() * factor


@contextmanager
def _bare(layer: Any) -> Iterator[None]:
    """Within, the layer has no bias."""
    bias, layer.bias = layer.bias, None
    try:
        yield
    finally:
        layer.bias = bias


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _refusal(name: str, layer: nn.Module, why: str) -> UsageError:
    return UsageError(
        f"train_scales: the scales of {name} ({type(layer).__name__}) cannot be trained: {why}. "
        "Leave that layer out, train adapters instead (model.peft), or quantise it with scales of "
        "outputs or of groups of one output's inputs."
    )
