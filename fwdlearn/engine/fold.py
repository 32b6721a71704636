"""The folded pass: many queries as the rows of one forward pass, no weight ever written.

Operations of an unmodified model that take a parameter are intercepted (`watch.py` says how), and
a rule adds what each row's direction contributes: `x W.T + scale (x b) a.T` for a low-rank
direction of a linear layer. A use that no rule covers runs row by row on a materialised parameter,
which is slow and right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fwdlearn.engine.queries import Queries
from fwdlearn.engine.trace import Rows, TraceError, Use, opened, tensors, unchanged
from fwdlearn.engine.varying import Varying
from fwdlearn.factors import LowRank


class Fold:
    """Perturbs every use of a parameter in one forward pass.

    Args:
        names: id of a parameter -> its name.
        uses: from `trace.compare`.
        rules: torch function -> rule.
        queries: one for each row of the forward pass.
        kind: of tensors whose operations are intercepted.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        uses: Sequence[Use],
        rules: Mapping[Any, Rule],
        queries: Queries,
        kind: type[Tensor] = Tensor,
    ) -> None:
        self.names, self.uses, self.rules = names, uses, rules
        self.queries, self.kind = queries, kind
        self.cursor = 0
        group = queries.group
        self.scale = queries.scale[::group]
        self.factors = queries.directions.at(queries.direction[::group])
        self._scales: dict[tuple[torch.dtype, float], Tensor] = {}
        # Tensors made of parameters alone, kept alive so that no other takes their id.
        self._made: dict[int, tuple[Tensor, Varying | None]] = {}

    @property
    def rows(self) -> int:
        return len(self.queries)

    @property
    def points(self) -> int:
        return len(self.scale)

    def finish(self) -> None:
        """Raises TraceError unless every use that was expected has come."""
        if self.cursor != len(self.uses):
            raise TraceError("the model left out operations that it ran when it was traced")

    def opened(self, func: Any) -> Callable[..., Any] | None:
        """A function to be run with its inner calls intercepted instead of itself."""
        return None if func in self.rules else opened(func)

    def takes(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
        """Whether a parameter, or something made of parameters alone, is among the arguments."""
        return self._takes(args) or bool(kwargs) and self._takes(kwargs.values())  # type: ignore[union-attr]

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An operation that `takes` a parameter, as each row's own direction changes it."""
        if unchanged(func, args, kwargs):
            return args[0]
        if self.cursor >= len(self.uses) or self.uses[self.cursor].func != func:
            return self._unseen(func, args, kwargs)
        call = Call(self, self.uses[self.cursor], args, kwargs)
        out = self.rules.get(func, by_row)(call, *args, **kwargs)
        self.cursor += 1
        return replaced(out, self._followed) if call.use.constant else out

    def _followed(self, value: Tensor) -> Tensor:
        return value if id(value) in self._made else self.carry(value, None)

    def _takes(self, values: Iterable[Any]) -> bool:
        """Whether a parameter, or something made of parameters alone, is among the values."""
        names, made = self.names, self._made
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in names or id(value) in made:
                    return True
            elif isinstance(value, (tuple, list)):
                if self._takes(value):
                    return True
            elif isinstance(value, dict) and self._takes(value.values()):
                return True
        return False

    def is_made(self, value: Tensor) -> bool:
        """Whether it is a parameter, or made of parameters alone."""
        return id(value) in self.names or id(value) in self._made

    def is_dense(self, value: Tensor) -> bool:
        """Whether it stores its numbers as they are, and no quantised form of them."""
        return type(value) in (Tensor, nn.Parameter, self.kind)

    def grouped(self, value: Any) -> Varying | None:
        """What points see of a parameter, or of something made of parameters alone."""
        name = self.names.get(id(value))
        if name is None:
            return self._made.get(id(value), (None, None))[1]
        if name not in self.queries.directions.sites:
            return None
        group, wide = self.queries.group, torch.promote_types(value.dtype, torch.float32)
        factors = self.factors[name]
        if isinstance(factors, LowRank):
            thin = LowRank(factors.left, factors.right, 1.0)
            return Varying(value, self._scaled(wide, factors.scale), thin, group=group)
        scale = self._scaled(wide, 1.0).view(-1, *[1] * value.dim())
        return Varying(value, self.scale, delta=factors * scale, group=group)

    def _scaled(self, dtype: torch.dtype, size: float) -> Tensor:
        """[points]: the scale times the size of a factor, worked out once."""
        if (dtype, size) not in self._scales:
            self._scales[dtype, size] = (self.scale * size).to(dtype)
        return self._scales[dtype, size]

    def varying(self, value: Any) -> Varying | None:
        """The same with a point for each row."""
        grouped = self.grouped(value)
        return None if grouped is None else grouped.by_row()

    def picked(self, value: Any, entries: Tensor) -> LowRank | None:
        """The factors of a parameter, the left one at some rows of it alone; None if dense.

        Args:
            entries: int64 [rows, k].

        Returns:
            left [rows, k, rank], right [rows, n, rank].
        """
        name = self.names.get(id(value))
        site = self.queries.directions.sites.get(name or "")
        if name is None or site is None or not site.rank:
            return None
        group = self.queries.group
        thin = self.factors.picked(name, entries.reshape(len(entries) // group, -1))
        left = thin.left.view(*entries.shape, -1)
        return LowRank(left, thin.right.repeat_interleave(group, 0), thin.scale)

    def carry(self, plain: Tensor, varying: Varying | None) -> Tensor:
        """`plain` as a tensor whose rows see `varying`."""
        followed = plain if self.kind is Tensor else Tensor._make_subclass(self.kind, plain)
        self._made[id(followed)] = (followed, varying)
        return followed

    def _unseen(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        # Reading a size is no use.
        if not list(tensors(out)):
            return out
        raise TraceError(
            f"{getattr(func, '__name__', func)} takes a parameter where it did not when the "
            "model was traced"
        )


Rule = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """One use of a parameter in a folded pass, with what is known of its operands."""

    fold: Fold
    use: Use
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def func(self) -> Callable[..., Any]:
        return self.use.func

    @property
    def count(self) -> int:
        return self.fold.rows

    def rows(self, value: Tensor) -> Rows | None:
        """Where the rows lie in an operand; None where it has none."""
        for operand, rows in zip(tensors((self.args, self.kwargs)), self.use.inputs, strict=True):
            if operand is value:
                return rows
        raise AssertionError("not an operand of this call")

    def at_one_point(self) -> bool:
        """Whether all rows see the same parameters, which had better be written out then.

        Never in short dtypes, where a parameter plus a small change rounds back to itself.
        """
        fold = self.fold
        return fold.points == 1 and all(
            value.dtype in (torch.float32, torch.float64)
            for value in tensors((self.args, self.kwargs))
            if fold.is_made(value)
        )

    def written_out(self) -> Any:
        """Runs the operation on the parameters of the only point."""

        def seen(value: Tensor) -> Tensor:
            varying = self.fold.grouped(value)
            return value if varying is None else varying.narrowed(0)

        return self.func(*replaced(self.args, seen), **replaced(self.kwargs, seen))

    def by_row(self) -> Any:
        """Runs the operation row by row, each on its own materialised parameters."""
        return by_row(self, *self.args, **self.kwargs)


def by_row(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Any operation: row by row on materialised parameters."""
    operands = list(tensors((args, kwargs)))
    varying = {id(t): v for t in operands if (v := call.fold.varying(t)) is not None}
    if not varying:
        return call.func(*args, **kwargs)
    name = getattr(call.func, "__name__", "")
    changes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if changes and id(args[0]) in varying:
        raise TraceError(f"{name}() writes into a parameter")
    if call.use.constant:
        return _constant_by_row(call, varying, args, kwargs)

    def run(row: int) -> Any:
        def one(value: Tensor) -> Tensor:
            if id(value) in varying:
                return varying[id(value)].narrowed(row)
            rows = call.rows(value)
            if rows is None:
                return value
            return rows.last(rows.first(value, call.count)[row : row + 1])

        return call.func(*replaced(args, one), **replaced(kwargs, one))

    parts = [run(row) for row in range(call.count)]
    return args[0] if changes else _joined(call, parts)


def _joined(call: Call, parts: list[Any]) -> Any:
    where = iter(call.use.outputs)

    def join(*values: Any) -> Any:
        if isinstance(values[0], Tensor):
            rows = next(where)
            if rows is None:
                raise TraceError(f"{call.func.__name__} mixes the rows of the batch")
            return rows.last(torch.cat([rows.first(value, 1) for value in values]))
        if isinstance(values[0], (tuple, list)):
            return type(values[0])(join(*items) for items in zip(*values, strict=True))
        return values[0]

    return join(*parts)


def _constant_by_row(call: Call, operands: Mapping[int, Varying], args: Any, kwargs: Any) -> Any:
    """Parameters in, parameters out; unless the result was expanded over the rows."""
    plain = call.func(*args, **kwargs)
    results = list(tensors(plain))
    parts = []
    for row in range(call.count):

        def one(value: Tensor, row: int = row) -> Tensor:
            return operands[id(value)].narrowed(row) if id(value) in operands else value

        parts.append(list(tensors(call.func(*replaced(args, one), **replaced(kwargs, one)))))
    made = {}
    for result, rows, *seen in zip(results, call.use.outputs, *parts, strict=True):
        if rows is None:
            wide = torch.promote_types(result.dtype, torch.float32)
            delta = torch.stack([part.to(wide) - result.to(wide) for part in seen])
            varying = Varying(result, call.fold.queries.scale, delta=delta)
            made[id(result)] = call.fold.carry(result, varying)
        else:
            own = [rows.first(part, call.count)[row] for row, part in enumerate(seen)]
            made[id(result)] = rows.last(torch.stack(own))
    return replaced(plain, lambda value: made[id(value)])


def replaced(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """Nested arguments with `f` applied to every tensor."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, (tuple, list)):
        items = [replaced(item, f) for item in value]
        # Torch's own named results take a sequence, named tuples take their fields.
        return type(value)(*items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, dict):
        return {key: replaced(item, f) for key, item in value.items()}
    return value
