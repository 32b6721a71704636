"""The structured dual: one forward pass carries the slopes along many directions.

A torch function mode watches an unmodified model run on plain values. Beside every tensor that
depends on a parameter it keeps K tangents, [K, *shape], one for each direction, and each operation
turns those of its operands into those of its results: `dx W.T + (x b) a.T` for a low-rank direction
of a linear layer. The plain values are computed once for all K, there is no graph, and a tangent
is freed with the tensor that carries it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fwdlearn.directions import Directions
from fwdlearn.engine import trace
from fwdlearn.engine.tangents import Leaf
from fwdlearn.engine.trace import Rows, TraceError, Use, tensors
from fwdlearn.factors import LowRank

Rule = Callable[..., Any]

# A value that leaves torch leaves its tangents behind.
_ESCAPES = {"item", "tolist", "numpy", "__float__", "__array__"}
_AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod", "imatmul"}
# The copies are made once: they are needed for every operation of every layer.
_opened = lru_cache(trace.opened)


class HiddenError(TraceError):
    """An operation drops tangents without a word, whoever asks; the message names it."""


class Rules(Protocol):
    """Which rule differentiates an operation."""

    def __contains__(self, func: object) -> bool:
        """Whether the function is known as a whole and need not be opened."""

    def shared(self, func: Any) -> Rule | None:
        """The rule for operands with tangents; None where no result can have any."""

    def private(self, func: Any) -> Rule:
        """The rule where a parameter has tangents of its own for each row."""

    def constant(self, func: Any) -> Rule:
        """The rule where all operands do, and no operand depends on the batch."""


class Dual(TorchFunctionMode):
    """Differentiates the forward pass run inside it.

    Args:
        names: id of a parameter -> its name.
        uses: from `trace.compare`; read only where rows have directions of their own.
        rules: how operations are differentiated.
        directions: the family.
        ids: int64 [K] where all rows share their directions, [K, rows] where each has its own.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        uses: Sequence[Use],
        rules: Rules,
        directions: Directions,
        ids: Tensor,
    ) -> None:
        super().__init__()
        self.names, self.uses, self.rules = names, uses, rules
        self.count = len(ids)
        self.rows = ids.shape[1] if ids.dim() == 2 else None
        self.factors = directions.at(_run(ids.flatten()))
        self.cursor = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if not self._holds(args) and not (kwargs and self._holds(kwargs.values())):
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func not in self.rules and (inside := _opened(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        if getattr(func, "__name__", "") in _ESCAPES:
            raise TraceError(f"{func.__name__}() takes a value out of torch, and no slope with it")
        if kwargs.get("out") is not None:
            raise TraceError(f"{getattr(func, '__name__', func)}() writes into out=")
        if trace.unchanged(func, args, kwargs):
            return args[0]
        call = Call(self, func, args, kwargs)
        if self.rows is not None and any(map(self._is_traced, tensors((args, kwargs)))):
            return self._private(call)
        rule = self.rules.shared(func)
        return call.plain() if rule is None else rule(call, *args, **kwargs)

    def finish(self) -> None:
        """Raises TraceError unless every use that was expected has come."""
        if self.rows is not None and self.cursor != len(self.uses):
            raise TraceError("the model left out operations that it ran when it was traced")

    def tangent(self, value: Any) -> Tensor | None:
        """[K, *shape], or None where nothing moves."""
        if id(value) in self.names:
            return self.leaf(value).dense()  # type: ignore[union-attr]
        held = self._held(value)
        return held.dense() if isinstance(held, Leaf) else held

    def leaf(self, value: Any) -> Leaf | None:
        """What directions make of a parameter; of anything else, its tangents in the same form."""
        name = self.names.get(id(value))
        if name is not None:
            factors = self.factors[name]
            if isinstance(factors, LowRank):
                return Leaf(value.shape, self.count, self.rows, thin=factors)
            return Leaf(value.shape, self.count, self.rows, full=factors)
        held = self._held(value)
        if held is None or isinstance(held, Leaf):
            return held
        return Leaf(value.shape, len(held), None, full=held)

    def is_made(self, value: Any) -> bool:
        """Whether it is a parameter, or without rows and made of parameters alone."""
        return id(value) in self.names or (
            self._is_traced(value) and not isinstance(self._held(value), Tensor)
        )

    def carry(self, value: Tensor, tangent: Tensor | Leaf | None) -> Tensor:
        """`value`, with its tangents from now on."""
        value._fwdlearn_tangent = (self, tangent)  # type: ignore[attr-defined]
        return value

    def _held(self, value: Any) -> Tensor | Leaf | None:
        held = getattr(value, "_fwdlearn_tangent", None)
        return held[1] if held is not None and held[0] is self else None

    def _is_traced(self, value: Tensor) -> bool:
        """Whether the trace counts operations on it as uses of a parameter."""
        return id(value) in self.names or getattr(value, "_fwdlearn_made", None) is self

    def _holds(self, values: Iterable[Any]) -> bool:
        names = self.names
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in names:
                    return True
                held = getattr(value, "_fwdlearn_tangent", None)
                if held is not None and held[0] is self:
                    return True
                if getattr(value, "_fwdlearn_made", None) is self:
                    return True
            elif isinstance(value, (tuple, list)):
                if self._holds(value):
                    return True
            elif isinstance(value, dict) and self._holds(value.values()):
                return True
        return False

    def _private(self, call: Call) -> Any:
        """A use of a parameter whose tangents differ from row to row."""
        func, rule = call.func, self.rules.shared(call.func)
        if self.cursor >= len(self.uses) or self.uses[self.cursor].func != func:
            out = call.plain()
            # Reading a size is no use.
            if not list(tensors(out)):
                return out
            raise TraceError(
                f"{call.name}() takes a parameter where it did not when the model was traced"
            )
        call = replace(call, use=self.uses[self.cursor])
        assert call.use is not None
        if call.writes() and self.is_made(call.args[0]):
            raise TraceError(f"{call.name}() writes into a parameter")
        if rule is None or not any(self.leaf(t) for t in call.operands()):
            out = call.plain()
        elif not any(map(self.is_made, call.operands())):
            out = rule(call, *call.args, **call.kwargs)
        elif call.use.constant:
            out = self.rules.constant(func)(call, *call.args, **call.kwargs)
        else:
            out = self.rules.private(func)(call, *call.args, **call.kwargs)
        self.cursor += 1
        if call.use.constant:
            for result in tensors(out):
                result._fwdlearn_made = self  # type: ignore[attr-defined]
        return out


def _run(ids: Tensor) -> Tensor | slice:
    """Consecutive numbers as a slice: what they name is then a view, not a copy."""
    ends = ids[[0, -1]].tolist()
    whole = ends[1] - ends[0] == len(ids) - 1 and bool((ids.diff() == 1).all())
    return slice(ends[0], ends[1] + 1) if whole else ids


def writes(name: str) -> bool:
    """Whether an operation of that name writes into its first operand."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name[2:-2] in _AUGMENTED)
    return name.endswith("_")


@dataclass(frozen=True)
class Call:
    """One operation under the mode, with what is known of its operands.

    Args:
        use: where the rows lie, for an operation on a parameter whose tangents differ by row.
    """

    dual: Dual
    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    use: Use | None = None

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", str(self.func))

    def writes(self) -> bool:
        """Whether it writes into its first operand."""
        return writes(self.name)

    def plain(self) -> Any:
        """What the operation returns, without tangents."""
        return self.func(*self.args, **self.kwargs)

    def again(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs something else under the mode."""
        with self.dual:
            return func(*args, **kwargs)

    def operands(self) -> list[Tensor]:
        return list(tensors((self.args, self.kwargs)))

    def tangent(self, value: Any) -> Tensor | None:
        return self.dual.tangent(value)

    def leaf(self, value: Any) -> Leaf | None:
        return self.dual.leaf(value)

    def carry(self, value: Tensor, tangent: Tensor | Leaf | None) -> Tensor:
        return self.dual.carry(value, tangent)

    @property
    def count(self) -> int:
        """Rows of the pass, where they have directions of their own."""
        assert self.dual.rows is not None
        return self.dual.rows

    def rows(self, value: Tensor) -> Rows | None:
        """Where the rows lie in an operand; None where it has none, or where it does not matter."""
        if self.use is None:
            return None
        for operand, rows in zip(self.operands(), self.use.inputs, strict=True):
            if operand is value:
                return rows
        raise AssertionError("not an operand of this call")
