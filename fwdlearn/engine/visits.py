"""What passes do at the sites: find them, add noise, keep or multiply inputs.

A site is the output of a layer, found as a use of its parameters and named by the first of them;
further uses of the same one are `name#1`, `name#2` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fwdlearn.engine.local import NoProduct, Pull, shares_memory
from fwdlearn.engine.passes import Call, Gradients, Made, Pass, names
from fwdlearn.engine.trace import Rows, Use, tensors
from fwdlearn.errors import UsageError
from fwdlearn.noise import Noise, Output


class Survey(Pass):
    """Finds the sites.

    Attributes:
        sites: for each use the name of its site, or None.
        outputs: name of a site -> what is put out there.
        left_out: name of a parameter -> why a part of its gradient cannot be had.
    """

    def __init__(self, params: Mapping[str, Tensor], uses: Sequence[Use], rows: int) -> None:
        super().__init__(params, uses, rows)
        self.sites: list[str | None] = [None] * len(uses)
        self.outputs: dict[str, Output] = {}
        self.left_out: dict[str, str] = {}

    def visit(self, number: int, call: Call, out: Any) -> Any:
        if call.use.constant and not any(call.use.outputs):
            return out
        try:
            rows = _single(call, out)
            params = names(one for one, _ in call.terms(out))
        except NoProduct as error:
            for name in names(call.made):
                self.left_out.setdefault(name, str(error))
            return out
        before = sum(site.partition("#")[0] == params[0] for site in self.outputs)
        site = f"{params[0]}#{before}" if before else params[0]
        self.sites[number] = site
        shape = tuple(rows.first(out, self.rows).shape[1:])
        self.outputs[site] = Output(shape, out.dtype, params)
        return out


def _single(call: Call, out: Any) -> Rows:
    """Where the rows lie in the one output of a site."""
    if not isinstance(out, Tensor):
        raise NoProduct(f"{call.name} has no single output")
    rows = call.use.outputs[0]
    if rows is None:
        raise NoProduct(f"the output of {call.name} has no rows")
    return rows


class Visitor(Pass):
    """A pass whose sites are known.

    Args:
        model: parameters, uses and rows, as `Pass` takes them.
        sites: for each use the name of its site, or None.
    """

    def __init__(self, *model: Any, sites: Sequence[str | None]) -> None:
        super().__init__(*model)
        self.sites = sites

    def visit(self, number: int, call: Call, out: Any) -> Any:
        site = self.sites[number]
        if site is None:
            return out
        where = call.use.outputs[0]
        assert where is not None
        return self.stop(site, call, out, where)

    def stop(self, site: str, call: Call, out: Tensor, where: Rows) -> Tensor:
        """Sees an output; returns what the model goes on with."""
        raise NotImplementedError


class Noisy(Visitor):
    """Adds noise: number `index[j]` at `scale[j]` to row j."""

    def __init__(
        self, *model: Any, sites: Sequence[str | None], noise: Noise, index: Tensor, scale: Tensor
    ) -> None:
        super().__init__(*model, sites=sites)
        self.noise, self.index, self.scale = noise, index, scale
        self.wanted = frozenset(noise.names)

    def stop(self, site: str, call: Call, out: Tensor, where: Rows) -> Tensor:
        if site not in self.wanted:
            return out
        # An operation in place hands back its own operand, and whoever holds it sees the noise.
        if not any(out is t for t in call.args[:1]) and shares_memory(out, call.args):
            out = out.clone(memory_format=torch.contiguous_format)
        rows = where.first(out, self.rows)
        if tuple(rows.shape[1:]) != self.noise.shape(site):
            raise UsageError(
                f"the noise of {site} has shape {self.noise.shape(site)} a row, but its output "
                f"has {tuple(rows.shape[1:])}; make it from the sites of this very oracle."
            )
        self.noise.add(rows, site, self.index, self.scale)
        return out


@dataclass(frozen=True)
class Local:
    """The local product of a site on some rows.

    Args:
        site: its name.
        rows: how many.
        shape: of one row of the output.
        where: the rows of the output.
        terms: from `Call.terms`.
        inputs: what the terms read, and the version that they ought to read.
    """

    site: str
    rows: int
    shape: torch.Size
    where: Rows
    terms: Sequence[tuple[Made, Pull]]
    inputs: Sequence[tuple[Tensor, int]]

    def add(self, cotangent: Tensor, gradients: Gradients) -> None:
        """Adds what a cotangent of the output, [rows, *shape], contributes to the parameters."""
        if cotangent.shape != (self.rows, *self.shape):
            raise UsageError(
                f"the cotangent of {self.site} has shape {tuple(cotangent.shape)}, but its output "
                f"has {(self.rows, *self.shape)}."
            )
        if any(_version(value) != version for value, version in self.inputs):
            raise UsageError(
                f"the model overwrites the input of {self.site}, so that it cannot be kept; use "
                "the oracle's own gather(), which multiplies as it goes."
            )
        c = self.where.last(cotangent.to(torch.promote_types(cotangent.dtype, torch.float32)))
        for one, back in self.terms:
            one.pull(back(c), gradients)


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


class Gathering(Visitor):
    """Hands over each output with its local product.

    Args:
        take: (local product, output [rows, *shape]).
        keep: whether the products are to be used after the pass.

    Attributes:
        last: the last site, its output and the rows in it.
    """

    def __init__(
        self,
        *model: Any,
        sites: Sequence[str | None],
        take: Callable[[Local, Tensor], None],
        keep: bool,
    ) -> None:
        super().__init__(*model, sites=sites)
        self.take, self.keep = take, keep
        self.last: tuple[str, Tensor, Rows] | None = None

    def stop(self, site: str, call: Call, out: Tensor, where: Rows) -> Tensor:
        rows, inputs = where.first(out, self.rows), []
        if self.keep:
            call = call.forgotten()
            made = {id(one.value) for one in call.made}
            operands = tensors((call.args, call.kwargs))
            inputs = [(t, _version(t)) for t in operands if id(t) not in made]
        self.last = site, out, where
        self.take(Local(site, len(rows), rows.shape[1:], where, call.terms(out), inputs), rows)
        return out
