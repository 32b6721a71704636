"""Forward passes that stop at every layer's output.

A torch function mode walks through the uses of parameters that the trace has found. Where one of
them puts out something that has rows, there is a site; what a pass does there is its own affair.
Tensors made of parameters alone (a transpose, a slice, `1 + gain`) are followed to the layer that
uses them, with the way back to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fwdlearn.engine.fold import replaced
from fwdlearn.engine.local import PRODUCTS, NoProduct, Pull, additive, product
from fwdlearn.engine.trace import Rows, TraceError, Use, opened, tensors, unchanged

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """A parameter, or a tensor made of parameters alone.

    Args:
        value: the tensor.
        names: of the parameters; none where the way to them has been taken already.
        pull: adds to gradients what a cotangent of the tensor contributes.
        missing: why that is impossible, or None.
    """

    value: Tensor
    names: tuple[str, ...]
    pull: Callable[[Tensor, Gradients], None]
    missing: str | None = None


@dataclass(frozen=True)
class Call:
    """One use of parameters, as it happens."""

    use: Use
    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    made: tuple[Made, ...]

    @property
    def name(self) -> str:
        """Of the function."""
        return getattr(self.func, "__name__", str(self.func))

    def terms(self, out: Tensor) -> list[tuple[Made, Pull]]:
        """The local product for each operand that is made of parameters.

        Raises:
            NoProduct: it is not known for one of them.
        """
        made = {id(one.value): one for one in self.made}
        for one in self.made:
            if one.missing is not None:
                raise NoProduct(one.missing)
        pairs = product(self.func, self.args, self.kwargs, out)
        found = [(made.pop(id(t)), pull) for t, pull in pairs if t is not None and id(t) in made]
        if made:
            place = ", ".join(names(made.values()))
            raise NoProduct(f"{self.name} has no local product for the place of {place}")
        return found

    def forgotten(self) -> Call:
        """The same with stand-ins for operands whose values the product does not need."""
        if not additive(self.func):
            return self
        kept = {id(one.value) for one in self.made}

        def stand_in(value: Tensor) -> Tensor:
            return value if id(value) in kept else value.new_zeros(()).expand(value.shape)

        return replace(self, args=replaced(self.args, stand_in))


def names(made: Iterable[Made]) -> tuple[str, ...]:
    """The parameters that some tensors are made of, each once."""
    return tuple(dict.fromkeys(name for one in made for name in one.names))


class Pass(TorchFunctionMode):
    """Runs a model; `visit` is called wherever it uses a parameter.

    Args:
        params: name -> parameter.
        uses: from `trace.compare`.
        rows: how many the pass has.
    """

    def __init__(self, params: Mapping[str, Tensor], uses: Sequence[Use], rows: int) -> None:
        super().__init__()
        self.uses, self.rows = uses, rows
        self.made = {id(value): Made(value, (n,), _adding(n)) for n, value in params.items()}
        self.cursor = 0

    def visit(self, number: int, call: Call, out: Any) -> Any:
        """Sees use `number` and what it returned; returns what the model goes on with."""
        raise NotImplementedError

    def finish(self) -> None:
        """Raises TraceError unless every use that was expected has come."""
        if self.cursor != len(self.uses):
            raise TraceError("the model left out operations that it ran when it was traced")

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        made = {id(t): self.made[id(t)] for t in tensors((args, kwargs)) if id(t) in self.made}
        if not made:
            return func(*args, **kwargs)
        if func not in PRODUCTS and (inside := opened(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        if unchanged(func, args, kwargs):
            return args[0]
        if self.cursor >= len(self.uses) or self.uses[self.cursor].func != func:
            out = func(*args, **kwargs)
            # Reading a size is no use.
            if list(tensors(out)):
                name = getattr(func, "__name__", func)
                raise TraceError(f"{name} takes a parameter where it did not when it was traced")
            return out
        number = self.cursor
        use = self.uses[number]
        self.cursor += 1
        call = Call(use, func, args, kwargs, tuple(one for one in made.values() if one.names))
        out = func(*args, **kwargs)
        if call.made:
            out = self.visit(number, call, out)
        if use.constant:
            for result, rows in zip(tensors(out), use.outputs, strict=True):
                self.made[id(result)] = _derived(call, result, rows)
        return out


def _adding(name: str) -> Callable[[Tensor, Gradients], None]:
    def pull(c: Tensor, gradients: Gradients) -> None:
        gradients[name] = gradients[name] + c if name in gradients else c

    return pull


def _derived(call: Call, result: Tensor, rows: Rows | None) -> Made:
    """A result made of parameters; with rows it is a layer's output, and the way back is there."""

    def nowhere(c: Tensor, gradients: Gradients) -> None:
        raise AssertionError("there is no way back from here")

    if rows is not None or not call.made:
        return Made(result, (), nowhere)
    try:
        terms = call.terms(result)
    except NoProduct as error:
        return Made(result, names(call.made), nowhere, str(error))

    def pull(c: Tensor, gradients: Gradients) -> None:
        for one, back in terms:
            one.pull(back(c), gradients)

    return Made(result, names(call.made), pull)
