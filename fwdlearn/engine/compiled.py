"""The folded pass as one compiled graph.

A folded pass is traced to a graph whose inputs are everything that changes from block to block:
the weights, the numbers of the directions, their sizes, the rows. The graph is compiled once for
each shape of a block; blocks are padded with copies of their last point to powers of two, so that
unequal counts make few shapes. What the model decides in Python while it is traced is fixed in the
graph, so each graph is compared with the plain fold when it is new and every hundredth time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fwdlearn.batch import Batch
from fwdlearn.engine.fold import Rule, replaced
from fwdlearn.engine.queries import Queries
from fwdlearn.engine.trace import Use, tensors
from fwdlearn.engine.watch import by_mode

# Where a module holds a parameter, under which name of its own, and the parameter's name.
_Place = tuple[dict[str, nn.Parameter | None], str, str]

_CHECK_EVERY = 100
# Largest difference from the plain fold, relative to the losses.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class Compiled:
    """Graphs of the folded passes of one model.

    Args:
        model: the model.
        params: its trainable parameters.
        row_losses: (output, rows) -> losses.
        backend: of `torch.compile`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        row_losses: Callable[[object, Batch], Tensor],
        backend: str = "inductor",
    ) -> None:
        self.model, self.params, self.row_losses = model, params, row_losses
        self.backend = backend
        names = {id(value): name for name, value in params.items()}
        self.places: list[_Place] = [
            (module._parameters, own, names[id(value)])
            for module in model.modules()
            for own, value in module._parameters.items()
            if id(value) in names
        ]
        self.graphs: dict[Any, Callable[..., Tensor]] = {}
        self.calls = 0
        self.refusal: str | None = None

    def losses(
        self,
        queries: Queries,
        uses: Sequence[Use],
        rules: Mapping[Any, Rule],
        eager: Callable[[], Tensor],
    ) -> Tensor:
        """Losses [queries] of one block; from `eager`, and `refusal` set, if that cannot be."""
        if self.refusal is None and queries.dropout is not None:
            self.refusal = "dropout is drawn anew in every pass"
        if self.refusal is not None:
            return eager()
        padded = _padded(queries)
        inputs = self._inputs(padded)
        shapes = tuple((value.shape, value.dtype) for value in inputs)
        family = padded.directions
        place = (padded.group, family.law, family.rank, tuple(family.sites), shapes)
        new = place not in self.graphs
        try:
            if new:
                self.graphs[place] = self._graph(padded, uses, rules, inputs)
            losses = self.graphs[place](*inputs)[: len(queries)].clone()
        except Exception as error:
            # Whatever the compiler stumbles over, the plain fold goes on, and says why.
            self.refusal = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            return eager()
        self.calls += 1
        if new or self.calls % _CHECK_EVERY == 0:
            plain = eager()
            allowed = _TOLERANCE.get(next(iter(self.params.values())).dtype, 0.05)
            apart = float(((losses - plain).abs() / plain.abs().clamp(min=1e-3)).max())
            if not apart <= allowed:
                self.refusal = f"the compiled losses differ by {apart:.1e} of themselves"
                return plain
        return losses

    def _inputs(self, queries: Queries) -> list[Tensor]:
        factors = queries.directions.at(queries.direction[:: queries.group])
        buffers, raws = factors.numbers()
        rows = queries.inputs()
        return [
            *(value.detach() for value in self.params.values()),
            *(buffers[dtype] for dtype in sorted(buffers, key=str)),
            *(raws[name] for name in sorted(raws)),
            queries.scale,
            *tensors((rows.args, dict(rows.kwargs), rows.targets)),
        ]

    def _graph(
        self,
        queries: Queries,
        uses: Sequence[Use],
        rules: Mapping[Any, Rule],
        inputs: Sequence[Tensor],
    ) -> Callable[..., Tensor]:
        factors = queries.directions.at(queries.direction[:: queries.group])
        buffers, raws = factors.numbers()
        rows = queries.inputs()

        def run(*values: Tensor) -> Tensor:
            feed = iter(values)
            params = {name: next(feed) for name in self.params}
            numbers = {dtype: next(feed) for dtype in sorted(buffers, key=str)}
            long = {name: next(feed) for name in sorted(raws)}
            asked = replace(queries, scale=next(feed))
            # Which rows recur is no input: every query runs in full.
            asked.__dict__["repeats"] = None
            args, kwargs, targets = replaced(
                (rows.args, dict(rows.kwargs), rows.targets), lambda _: next(feed)
            )
            batch = Batch(args, targets, kwargs)
            with _holding(self.places, params), torch.no_grad():
                with by_mode(self.model, params, uses, rules) as start, start(asked) as fold:
                    fold.factors = factors.given(numbers, long)
                    output = self.model(*batch.args, **batch.kwargs)
                fold.finish()
                return self.row_losses(output, batch)

        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            graph = make_fx(run)(*inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        # On a GPU small kernels are launched as one graph.
        mode = "reduce-overhead" if inputs[0].is_cuda and self.backend == "inductor" else None
        compiled = torch.compile(graph, dynamic=False, backend=self.backend, mode=mode)

        def call(*values: Tensor) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return compiled(*values)

        return call


def _padded(queries: Queries) -> Queries:
    """As many points as the next power of two, the last one again and again."""
    points = len(queries) // queries.group
    missing = (1 << (points - 1).bit_length()) - points
    if not missing:
        return queries
    own = torch.arange(len(queries), device=queries.row.device)
    last = own[-queries.group :].repeat(missing)
    return replace(queries.at(torch.cat((own, last))), group=queries.group)


@contextmanager
def _holding(places: Sequence[_Place], others: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the model holds `others` in place of its parameters."""
    kept = [(holder, own, holder[own]) for holder, own, _ in places]
    try:
        for holder, own, name in places:
            holder[own] = others[name]  # type: ignore[assignment]
        yield
    finally:
        for holder, own, value in kept:
            holder[own] = value
