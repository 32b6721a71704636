"""Quantised layers: perturbing a matrix that no small step can change, without touching it.

A quantised layer computes `x Q(W).T + bias` from integers. Its output is linear in the matrix
that they stand for all the same, so losses at `W + scale E` need neither a write nor a dequantised
copy: `scale (x b) a.T` is added to what the layer puts out. That matrix is a *virtual weight*: it
has a name, a shape and directions, and no storage. While a pass runs, zeros that take no memory
stand in its place, and every rung perturbs them as it perturbs a parameter.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import handle_torch_function, has_torch_function

from fwdlearn.engine.fold import Call
from fwdlearn.errors import UsageError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_quantized(value: Tensor) -> bool:
    """Whether a tensor stands for numbers that it does not store as floating point of 16 bits up.

    Such are integers, eight-bit floats, and torchao's tensors, which hold either inside.
    """
    return any(one.dtype not in _FLOATS and not one.is_complex() for one in stored(value))


def stored(value: Tensor) -> Iterator[Tensor]:
    """What lies inside a tensor that is made of others, as torchao's are; else the tensor."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None:
        yield value
    else:
        for name in flatten()[0]:
            yield from stored(getattr(value, name))


def quantized_layers(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Name of a virtual weight -> the layers that use it: more than one where it is tied.

    A quantised layer is any module with `in_features` and `out_features` that keeps its matrix in
    another form than floating point of 16 bits up: bitsandbytes' layers, torchao's tensors in
    `nn.Linear`, integers in buffers. A wrapper around such a layer, an adapter's, is none.
    """
    names: dict[int, str] = {}
    users: dict[int, dict[int, nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_quantized_layer(module):
            weight = getattr(module, "weight", None)
            stored = id(weight if isinstance(weight, Tensor) else module)
            name = f"{path}.weight".lstrip(".")
            names[stored] = min(name, names.get(stored, name))
            users.setdefault(stored, {})[id(module)] = module
    return {name: tuple(users[stored].values()) for stored, name in names.items()}


def _is_quantized_layer(module: nn.Module) -> bool:
    # Attention hands the matrix of such a layer to a function and never runs the layer.
    if not _is_linear(module) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if any(_is_linear(inner) for inner in module.modules() if inner is not module):
        return False
    entries = _features(module)[0] * _features(module)[1]
    held = [*module.parameters(), *module.buffers()]
    if any(not is_quantized(t) and t.dim() > 1 and t.numel() >= entries for t in held):
        return False
    # What holds no tensor at all has packed its integers for a kernel, as torch's own do.
    return not held or any(is_quantized(t) and 8 * t.nbytes >= entries for t in held)


def _features(module: nn.Module) -> tuple[Any, Any]:
    return getattr(module, "out_features", None), getattr(module, "in_features", None)


def _is_linear(module: nn.Module) -> bool:
    return all(isinstance(size, int) for size in _features(module))


class Quantized:
    """The quantised layers of a model.

    Args:
        model: any module.
        trained: name -> parameter that is trained.
        virtual: patterns of the names (`<layer>.weight`) of virtual weights that get directions.

    Attributes:
        weights: name of a virtual weight -> zeros [out_features, in_features] that take no memory,
            in the dtype that the layer computes in.

    Raises:
        UsageError: a pattern matches no virtual weight.
    """

    def __init__(
        self, model: nn.Module, trained: Mapping[str, Tensor], virtual: Sequence[str] = ()
    ) -> None:
        found = quantized_layers(model)
        names = _matching(virtual, found)
        self.weights = {name: _zeros(found[name][0], model) for name in names}
        ids = {id(value) for value in trained.values()}
        self._layers = [
            _Layer(name, module, self.weights.get(name), ids)
            for name, modules in found.items()
            for module in modules
        ]
        self._within = self._checked = False

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within, virtual weights are parameters, and layers run as a `quantized_linear` each.

        Even a layer that nothing perturbs: kernels outside torch leave no trace of the rows.
        """
        if self._within or not self._layers:
            yield
            return
        with ExitStack() as undo:
            undo.callback(setattr, self, "_within", False)
            self._within = True
            for layer in self._layers:
                layer.show(undo)
            yield

    def check(self, run: Callable[[], Tensor]) -> None:
        """Finds out in a pass whether the layers are what they seem, unless that is known.

        One that is not linear is left to run as it always did.

        Args:
            run: a plain pass -> losses.

        Raises:
            UsageError: a virtual weight belongs to a layer that is not linear, or that the model
                uses in another way than by running it.
        """
        if self._checked or not self._layers:
            return
        with self.shown(), ExitStack() as watching:
            for layer in self._layers:
                watching.enter_context(layer.checked())
            run()
        for layer in self._layers:
            if layer.weight is not None and not layer.linear:
                raise UsageError(
                    f"{type(layer.module).__name__} is not linear in its input, so its output "
                    f"does not tell what {layer.name} does there; leave it out of virtual=... ."
                )
        self._layers = [layer for layer in self._layers if layer.linear]
        self._checked = True
        if not self.weights:
            return
        plain = run()
        with self.shown():
            seen = run()
        # A model that never equals itself is no affair of its quantised layers.
        if not torch.allclose(seen, plain, 0.02, 0.02) and torch.equal(run(), plain):
            self._checked = False
            raise UsageError(
                f"the model does not run its quantised layers ({', '.join(self.weights)}) but "
                "reads what they hold, where nothing can be perturbed; write it so that it calls "
                "them, or leave them out of virtual=... ."
            )


class _Layer:
    """A quantised layer.

    Args:
        name: of its virtual weight.
        module: the layer.
        weight: what stands for its matrix where that is perturbed, else None.
        trained: ids of the parameters that are trained.

    Attributes:
        linear: whether it is, but for its bias, as far as is known.
    """

    def __init__(
        self, name: str, module: nn.Module, weight: nn.Parameter | None, trained: Collection[int]
    ) -> None:
        self.name, self.module, self.weight, self.linear = name, module, weight, True
        self._own, self._params = module.__dict__, module._parameters
        self._places = (self._own, self._params, module._buffers)
        self._bias = self._place("bias")
        bias = None if self._bias is None else self._bias["bias"]
        # Other trained parameters, such as scales, are perturbed where the layer uses them.
        self._opaque = not any(
            id(value) in trained and value is not bias for value in module.parameters()
        )

    def show(self, undo: ExitStack) -> None:
        """Puts itself in the place of the layer's forward pass, until `undo`."""
        self._stored: Any = None
        if self.weight is not None:
            # Of its name there must be nothing else, be it a buffer or a plain attribute.
            place = self._place("weight")
            undo.callback(_put, self._params, "weight", self._params.get("weight", _GONE))
            if place is not None:
                self._stored = place["weight"]
                undo.callback(_put, place, "weight", self._stored)
                _put(place, "weight", _GONE if place is self._own else None)
            self._params["weight"] = self.weight
        self._forward = self.module.forward
        undo.callback(_put, self._own, "forward", self._own.get("forward", _GONE))
        self._own["forward"] = self._run

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Within `shown`, finds out whether the layer is linear but for its bias."""

        def check(module: nn.Module, args: Any, kwargs: Any) -> None:
            args, kwargs = _positional(args, kwargs)
            whole = self._inner(args, kwargs, biased=True)
            up, down = self._inner(args, kwargs), self._inner((-args[0], *args[1:]), kwargs)
            shift = 0 if self._bias is None else self._bias["bias"]
            size = whole.abs().max()
            # Activations that are quantised on the way leave a few per cent.
            odd = (up + down).abs().max() > 0.1 * size
            self.linear &= not (odd or (up + shift - whole).abs().max() > 0.01 * size)

        handle = self.module.register_forward_pre_hook(check, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        weight = None if self.weight is None else self._params["weight"]
        bias = None if self._bias is None else self._bias["bias"]
        (input, *rest), kwargs = _positional(args, kwargs)

        def product(input: Tensor) -> Tensor:
            return self._inner((input, *rest), kwargs)

        return quantized_linear(input, product if self._opaque else product(input), weight, bias)

    def _inner(self, args: Any, kwargs: Any, biased: bool = False) -> Tensor:
        """What the layer itself makes of its input, as a rule without its bias."""
        inside: list[tuple[Any, str, Any]] = []
        if self.weight is not None:
            inside.append((self._params, "weight", self._stored))
        if self._bias is not None and not biased:
            inside.append((self._bias, "bias", None))
        outside = [(place, name, place[name]) for place, name, _ in inside]
        try:
            for place, name, value in inside:
                place[name] = value
            # A quantised tensor may be of a class of its own, which a rule must not get around.
            with torch._C._EnableTorchFunction():
                output = self._forward(*args, **kwargs)
        finally:
            for place, name, value in outside:
                place[name] = value
        if not isinstance(output, Tensor):
            raise UsageError(
                f"{type(self.module).__name__}, a quantised layer, returns "
                f"{type(output).__name__}; it must return a tensor."
            )
        return output

    def _place(self, name: str) -> Any:
        """Where the layer keeps a tensor, or None."""
        return next((p for p in self._places if isinstance(p.get(name), Tensor)), None)


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a layer with its input in front."""
    if args:
        return args, kwargs
    name = next(iter(kwargs))
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


_GONE = object()


def _put(place: Any, name: str, value: Any) -> None:
    if value is _GONE:
        place.pop(name, None)
    else:
        place[name] = value


Product = Tensor | Callable[[Tensor], Tensor]


def quantized_linear(
    input: Tensor, product: Product, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`product + input @ weight.T + bias`, summed in float32 at least and rounded once.

    A torch function, so that modes see it: what the rungs perturb is this operation.

    Args:
        input: [..., n].
        product: [..., m], what the layer makes of its input without a bias; or the linear map
            itself, where nothing in it is perturbed.
        weight: [m, n], what is added to the matrix of the layer.
        bias: [m].
    """
    operands = tuple(t for t in (input, product, weight, bias) if isinstance(t, Tensor))
    if has_torch_function(operands):
        return handle_torch_function(quantized_linear, operands, input, product, weight, bias)
    output = product if isinstance(product, Tensor) else product(input)
    total = output.to(torch.promote_types(output.dtype, torch.float32))
    if weight is not None and not getattr(weight, "_fwdlearn_zeros", False):
        total = total + F.linear(input.to(weight.dtype), weight)
    if bias is not None:
        total = total + bias
    return total.to(output.dtype)


def fold_rule(
    call: Call,
    input: Tensor,
    product: Product,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Any:
    """How the fold perturbs a `quantized_linear`."""
    fold, rows, count = call.fold, call.rows(input), call.count
    if rows is None or rows.axis == input.dim() - 1:
        return call.by_row()
    if isinstance(product, Tensor) and call.rows(product) != rows:
        return call.by_row()
    repeats = fold.queries.repeats if call.use.clean else None
    if isinstance(product, Tensor):
        output = product
    elif repeats is None:
        output = product(input)
    else:
        # The queries of a row still see the same input: one product serves them all.
        few = product(rows.last(rows.first(input, count)[repeats.first]))
        output = rows.last(rows.first(few, len(repeats.first))[repeats.inverse])
    varying, shift = fold.grouped(weight), fold.grouped(bias)
    y, x = rows.first(output, count), rows.first(input, count)
    points = fold.points
    if not (y.is_contiguous() and x.is_contiguous()):
        points, varying = count, None if varying is None else varying.by_row()
        shift = None if shift is None else shift.by_row()
    entries = y.reshape(points, -1, y.shape[-1])
    x = x.reshape(points, -1, x.shape[-1]).to(y.dtype)
    # Wide, so that rounding to a short dtype happens once.
    total = entries if bias is None else entries.to(torch.promote_types(y.dtype, torch.float32))
    if shift is not None:
        total = total + shift.batched().unsqueeze(1)
    elif bias is not None:
        total = total + bias
    if varying is not None:
        varying.to(y.dtype).add_product(total, x)
    if total is not entries:
        entries.copy_(total)
    if entries.data_ptr() != y.data_ptr():
        y.copy_(entries.view(y.shape))
    return output


def _matching(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    names = sorted(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UsageError(
                f"virtual={list(patterns)}: {pattern!r} matches no weight of a quantised layer; "
                f"there are {', '.join(names[:3]) or 'none'}. Parameters in floating point are "
                "perturbed whenever they require a gradient."
            )
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


def matrix_dtype(layer: nn.Module, model: nn.Module) -> torch.dtype:
    """The dtype that a quantised layer computes in."""
    own = [getattr(layer, name, None) for name in ("weight", "bias")]
    near = (t for t in (*own, *model.parameters()) if isinstance(t, Tensor))
    # A quantised tensor names the dtype that it is computed in, unless that is of integers.
    return next((t.dtype for t in near if t.dtype in _FLOATS), torch.get_default_dtype())


def _zeros(layer: nn.Module, model: nn.Module) -> nn.Parameter:
    """What stands for the matrix of a layer."""
    held = next(iter((*layer.parameters(), *layer.buffers())), None)
    device = None if held is None else held.device
    zero = torch.zeros((), dtype=matrix_dtype(layer, model), device=device)
    zeros = nn.Parameter(zero.expand(_features(layer)), requires_grad=False)
    zeros._fwdlearn_zeros = True  # type: ignore[attr-defined]
    return zeros
