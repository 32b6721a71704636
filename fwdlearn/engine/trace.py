"""Where a model uses its parameters, and where the rows of the batch lie when it does.

The fold must know, for every operation that takes a parameter, which axis of the other operands
runs over the rows. A model may put it anywhere (`[rows, tokens, d]`, `[rows * tokens, d]`,
`[tokens, rows, d]`, `[tokens * rows, d]`) or have none at all (a table of positions). Sizes of one
run cannot tell: tokens may be as many as rows. So the model runs on two rows and on three, and
whatever grew with the rows is where they lie.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Reading a parameter into Python loses track of it: no direction could reach what follows.
_ESCAPES = {"item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__array__"}
# Operations that may hand back the very tensor that they were given.
_ALIASES = {"to", "float", "double", "half", "bfloat16", "contiguous", "type_as", "type"}


class TraceError(Exception):
    """The model cannot be folded; the message is the reason that the user sees."""


@dataclass(frozen=True)
class Rows:
    """Where the rows lie in a tensor.

    Args:
        axis: the axis that runs over them, counted from the left.
        flat: whether the axis holds several entries a row.
        minor: whether consecutive entries of a flat axis belong to different rows.
    """

    axis: int
    flat: bool = False
    minor: bool = False

    def first(self, value: Tensor, rows: int) -> Tensor:
        """A view with the rows as dimension 0."""
        if value.dim() <= self.axis or value.shape[self.axis] % rows:
            raise TraceError(
                f"a tensor of shape {tuple(value.shape)} does not hold {rows} rows on axis "
                f"{self.axis}: the model handles this batch differently"
            )
        axis = self.axis
        if self.flat:
            entries = value.shape[axis] // rows
            sizes = (entries, rows) if self.minor else (rows, entries)
            value = value.unflatten(axis, sizes)
            axis += int(self.minor)
        elif value.shape[axis] != rows:
            raise TraceError(
                f"a tensor of shape {tuple(value.shape)} has {value.shape[axis]} rows where "
                f"{rows} were expected: the model handles this batch differently"
            )
        return value.movedim(axis, 0)

    def last(self, value: Tensor) -> Tensor:
        """Undoes `first`; a view where that is possible."""
        if not self.flat:
            return value.movedim(0, self.axis)
        value = value.movedim(0, self.axis + int(self.minor))
        return value.flatten(self.axis, self.axis + 1)


@dataclass(frozen=True)
class Use:
    """One operation on a parameter, or on something made of parameters alone.

    Args:
        func: the torch function.
        inputs: for each tensor among its arguments, in order: where the rows lie, or None.
        outputs: the same for its results.
        constant: whether no operand depends on the batch, so that the results are made of
            parameters alone and must be followed further.
        clean: whether the operands that depend on the batch depend on no parameter yet, so that
            all queries of a row share them.
    """

    func: Callable[..., Any]
    inputs: tuple[Rows | None, ...]
    outputs: tuple[Rows | None, ...]
    constant: bool
    clean: bool


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def unchanged(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call does nothing, such as `float()` of a float32 tensor."""
    return getattr(func, "__name__", "") in _ALIASES and func(*args, **kwargs) is args[0]


def opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A composite function of `torch.nn.functional` as one whose inner calls are intercepted.

    Such a function hands itself to the active mode before it does anything else; a copy that
    skips this step exposes the operations inside. None where there is nothing to open.
    """
    if not isinstance(func, types.FunctionType) or func.__module__ != "torch.nn.functional":
        return None
    if func.__closure__:
        # It chooses between two others, and both hand it to the mode again.
        return None
    skip = {
        name: lambda *_: False for name in func.__globals__ if name.startswith("has_torch_function")
    }
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **skip}, func.__name__, func.__defaults__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


@dataclass(frozen=True)
class Profile:
    """The shape of a tensor and its sums along each axis: enough to recognise its rows."""

    shape: tuple[int, ...]
    sums: tuple[Tensor, ...]

    @classmethod
    def of(cls, value: Tensor) -> Profile:
        if isinstance(value, nn.Parameter):
            # No rows lie in a parameter, and its sums may take more memory than the pass.
            return cls(tuple(value.shape), ())
        axes = range(value.dim())
        wide = value.detach().float()
        sums = (wide.sum([other for other in axes if other != axis]) for axis in axes)
        return cls(tuple(value.shape), tuple(sums) if value.dim() > 1 else (wide,))


@dataclass(frozen=True)
class _Seen:
    func: Callable[..., Any]
    inputs: list[Profile]
    outputs: list[Profile]
    constant: bool
    clean: bool


class Recorder(TorchFunctionMode):
    """Runs a model plainly and writes down every use of a parameter.

    Args:
        names: id of a parameter -> its name.
        rules: functions that the fold knows as a whole, and that need not be opened.
    """

    def __init__(self, names: Mapping[int, str], rules: Mapping[Any, Any]) -> None:
        super().__init__()
        self.names = names
        self.rules = rules
        self.seen: list[_Seen] = []
        self.widest = 0
        self._tables: set[str] = set()
        self._others: set[str] = set()
        self._past = False

    def start(self, inputs: Any) -> None:
        """Marks the batch, so that what depends on it can be told from what does not."""
        for value in tensors(inputs):
            value._fwdlearn_batch = self  # type: ignore[attr-defined]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = list(tensors((args, kwargs)))
        made = [t for t in operands if self.is_made(t)]
        if not made:
            out = func(*args, **kwargs)
            self._mark(func, args, kwargs, operands, out)
            self._past |= ends_lookups(func, args, kwargs, out)
            return out
        if func not in self.rules and (inside := opened(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _ESCAPES:
            raise TraceError(f"{name}() takes a parameter out of torch")
        if unchanged(func, args, kwargs):
            return args[0]
        before = [Profile.of(t) for t in operands]
        out = func(*args, **kwargs)
        results = list(tensors(out))
        if not results and name != "__setitem__":
            return out
        self._count(func, operands, args, kwargs)
        constant = not any(getattr(t, "_fwdlearn_batch", None) is self for t in operands)
        clean = not any(getattr(t, "_fwdlearn_touched", None) is self for t in operands)
        after = [Profile.of(r) for r in results]
        self.seen.append(_Seen(func, before, after, constant, clean))
        self._mark(func, args, kwargs, operands, out, touched=True)
        if constant:
            for result in results:
                result._fwdlearn_made = self  # type: ignore[attr-defined]
        return out

    @property
    def tables(self) -> frozenset[str]:
        """Parameters that entries were looked up in before others were used, and nothing else."""
        return frozenset(self._tables - self._others)

    def _count(self, func: Any, operands: list[Tensor], args: Any, kwargs: Any) -> None:
        names = {self.names[id(t)] for t in operands if id(t) in self.names}
        if looks_up(func, args, kwargs) and not self._past:
            self._tables |= names
        else:
            self._others |= names
            self._past = True

    def is_made(self, value: Tensor) -> bool:
        """Whether it is a parameter, or made of parameters alone."""
        return id(value) in self.names or getattr(value, "_fwdlearn_made", None) is self

    def _mark(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        operands: list[Tensor],
        out: Any,
        touched: bool = False,
    ) -> None:
        results = list(tensors(out))
        self.widest = max(self.widest, *(t.numel() * t.element_size() for t in results), 0)
        if not any(getattr(t, "_fwdlearn_batch", None) is self for t in operands):
            return
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            results.extend(tensors(args[:1]))
        results.extend(tensors(kwargs.get("out")))
        touched = touched or any(getattr(t, "_fwdlearn_touched", None) is self for t in operands)
        for result in results:
            result._fwdlearn_batch = self  # type: ignore[attr-defined]
            if touched:
                result._fwdlearn_touched = self  # type: ignore[attr-defined]


def looks_up(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation looks entries up in a table and does nothing else to it."""
    return func is F.embedding and _argument(args, kwargs, 3) is None


def ends_lookups(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> bool:
    """Whether an operation uses parameters in another way, after which no lookup is counted."""
    if looks_up(func, args, kwargs) or next(tensors(out), None) is None:
        return False
    return any(isinstance(t, nn.Parameter) for t in tensors((args, kwargs)))


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int) -> Any:
    """Of `F.embedding`."""
    name = ("input", "weight", "padding_idx", "max_norm")[place]
    return args[place] if len(args) > place else kwargs.get(name)


class Lookups(TorchFunctionMode):
    """Notes the entries that a pass looks up in tables, and ends it by `Known` after that.

    Args:
        tables: id of a table -> its name.
    """

    class Known(Exception):
        """All entries have been looked up."""

    def __init__(self, tables: Mapping[int, str]) -> None:
        super().__init__()
        self.names = tables
        self.found: dict[str, list[Tensor]] = {name: [] for name in tables.values()}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if looks_up(func, args, kwargs):
            name = self.names.get(id(_argument(args, kwargs, 1)))
            if name is not None:
                self.found[name].append(_argument(args, kwargs, 0).flatten())
        elif ends_lookups(func, args, kwargs, out):
            raise self.Known
        return out


def compare(two: Recorder, three: Recorder) -> tuple[Use, ...]:
    """The uses of a model, from its runs on two rows and on the same two and a third."""
    if [s.func for s in two.seen] != [s.func for s in three.seen]:
        raise TraceError("the operations depend on how many rows there are")
    uses = []
    for a, b in zip(two.seen, three.seen, strict=True):
        inputs = tuple(rows_of(*pair) for pair in zip(a.inputs, b.inputs, strict=True))
        outputs = tuple(rows_of(*pair) for pair in zip(a.outputs, b.outputs, strict=True))
        uses.append(Use(a.func, inputs, outputs, a.constant, a.clean))
    return tuple(uses)


def rows_of(two: Profile, three: Profile) -> Rows | None:
    if len(two.shape) != len(three.shape):
        raise TraceError("the number of dimensions depends on how many rows there are")
    grown = [axis for axis, size in enumerate(two.shape) if size != three.shape[axis]]
    if not grown:
        return None
    axis = grown[0]
    if len(grown) > 1 or two.shape[axis] * 3 != three.shape[axis] * 2:
        raise TraceError(
            f"a tensor grows from {two.shape} to {three.shape} with a third row, so its rows "
            "cannot be told apart"
        )
    entries = two.shape[axis] // 2
    if entries == 1:
        return Rows(axis)
    short, long = two.sums[axis], three.sums[axis]
    # Rounding differs with the batch, so the closer reading is taken, not the equal one.
    major = (long[: 2 * entries] - short).abs().nan_to_num(0.0).sum()
    minor = (long.unflatten(0, (entries, 3))[:, :2].flatten() - short).abs().nan_to_num(0.0).sum()
    return Rows(axis, flat=True, minor=bool(minor < major))
