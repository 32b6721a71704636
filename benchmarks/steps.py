"""Whole steps and their parts, as functions to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.models import cross_entropy
from fwdlearn.allocator import Plan
from fwdlearn.arithmetic import SHORT, alike
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine.slopes import Slopes
from fwdlearn.estimators import RandomPerturbation
from fwdlearn.gradient import DirectionGradient, update_of
from fwdlearn.keys import Key
from fwdlearn.oracle import ModelOracle

SIGMA = 1e-3
ESTIMATOR = RandomPerturbation(SIGMA, "leave-one-out")

Step = Callable[[], object]


def fold(
    model: nn.Module, batch: Batch, plan: Plan, rung: str = "fold", compile: bool = False
) -> Step:
    """A whole step: estimate, on a rung of the ladder, and plain gradient descent."""
    engine, numbers = Engine(model, cross_entropy, rung=rung, compile=compile), count()

    def step() -> None:
        oracle = ModelOracle(engine, batch)
        _update(engine.params, _gradient(oracle, plan, Key.root(0).fold(next(numbers))))

    return step


def dual(model: nn.Module, batch: Batch, plan: Plan, rung: str = "dual") -> Step:
    """A whole step on exact slopes: estimate and plain gradient descent.

    Args:
        rung: "dual", or "jvp" for torch's own forward mode along dense tangents.
    """
    engine, numbers = Engine(model, cross_entropy), count()
    engine.exact = Slopes(model, engine.params, engine.row_losses, rung)

    def step() -> None:
        oracle = ModelOracle(engine, batch)
        key = Key.root(0).fold(next(numbers))
        directions = Directions(key, oracle.params, plan.directions)
        slopes = oracle.slopes(plan.row, directions, plan.direction)[1]
        total = slopes.new_zeros(plan.directions, dtype=torch.float64)
        total.index_add_(0, plan.direction, plan.weight * slopes.double())
        _update(engine.params, DirectionGradient(directions, total))

    return step


def jvp(model: nn.Module, batch: Batch) -> Step:
    """The same by `torch.func.jvp`, along a single dense tangent."""
    params, numbers = dict(model.named_parameters()), count()
    params = {name: value.detach() for name, value in params.items() if value.requires_grad}

    def losses(*values: Tensor) -> Tensor:
        state = dict(zip(params, values, strict=True))
        output = functional_call(model, state, batch.args, dict(batch.kwargs))
        return cross_entropy(output, batch.targets)

    def step() -> None:
        directions = Directions(Key.root(0).fold(next(numbers)), params, 1)
        first = torch.zeros(1, dtype=torch.int64, device=directions.device)
        tangents = tuple(directions.dense(name, first)[0] for name in params)
        with torch.no_grad(), unfused():
            slopes = torch.func.jvp(losses, tuple(params.values()), tangents)[1]
        _update(params, DirectionGradient(directions, slopes.double().mean(0, keepdim=True)))

    return step


@contextmanager
def unfused() -> Iterator[None]:
    """Without fused attention and fused layers, which have no forward derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def noise(model: nn.Module, plan: Plan) -> Step:
    """The part of `fold` that draws the directions."""
    params, numbers = Engine(model, cross_entropy).params, count()

    def step() -> None:
        _drawn(Directions(Key.root(0).fold(next(numbers)), params, plan.directions))

    return step


def update(model: nn.Module, plan: Plan) -> Step:
    """The part of `fold` that forms the gradient from drawn directions, and descends."""
    params = Engine(model, cross_entropy).params
    directions = _drawn(Directions(Key.root(0), params, plan.directions))
    slopes = torch.linspace(-1, 1, plan.directions, dtype=torch.float64, device=directions.device)
    return lambda: _update(params, DirectionGradient(directions, slopes))


def inference(model: nn.Module, batch: Batch, index: Tensor, size: int) -> Step:
    """Plain losses of the rows `index` (int64 [queries], may repeat), `size` at a time."""
    # Laid out beforehand: what it takes to gather rows is not inference.
    parts = [batch.select(part) for part in index.to(batch.device).split(size)]

    def run() -> None:
        with torch.inference_mode():
            for part in parts:
                cross_entropy(model(*part.args, **part.kwargs), part.targets)

    return run


def plain(model: nn.Module, batch: Batch, index: Tensor, sizes: set[int]) -> dict[str, Step]:
    """`inference` by each of the sizes that there are rows for, and by all rows at once."""
    queries = len(index)
    sizes = {max(1, size) for size in sizes if size < queries} | {queries}
    return {f"inference by {s}": inference(model, batch, index, s) for s in sorted(sizes)}


def backprop(model: nn.Module, batch: Batch) -> Step:
    """One gradient of the batch, and plain gradient descent."""

    def step() -> None:
        cross_entropy(model(*batch.args, **batch.kwargs), batch.targets).mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        _update(dict(model.named_parameters()), gradients)
        model.zero_grad()

    return step


def in_place(model: nn.Module, batch: Batch, seeds: int) -> Step:
    """The published in-place recipe: two forward passes a seed, four sweeps over the weights."""
    parameters = list(model.parameters())

    def sweep(seed: int, scale: float) -> None:
        generator = torch.Generator(parameters[0].device).manual_seed(seed)
        for parameter in parameters:
            drawn = torch.empty_like(parameter).normal_(generator=generator)
            parameter.add_(drawn, alpha=scale)

    def losses() -> Tensor:
        return cross_entropy(model(*batch.args, **batch.kwargs), batch.targets).mean()

    def step() -> None:
        with torch.no_grad():
            for seed in range(seeds):
                sweep(seed, SIGMA)
                up = losses()
                sweep(seed, -2 * SIGMA)
                down = losses()
                sweep(seed, SIGMA)
                sweep(seed, -1e-9 * float(up - down))

    return step


def _gradient(oracle: ModelOracle, plan: Plan, key: Key) -> Mapping[str, Tensor]:
    if int(plan.counts.min()) > 1:
        return ESTIMATOR.estimate(oracle, oracle.params, None, key=key, plan=plan)[0].grad
    # Rows with a single direction have no other queries of their own: the batch is the baseline.
    directions = Directions(key, oracle.params, plan.directions)
    losses = oracle.losses(plan.row, directions, plan.direction, SIGMA).double()
    slopes = plan.weight * (losses - losses.mean()) / SIGMA
    total = slopes.new_zeros(plan.directions)
    return DirectionGradient(directions, total.index_add_(0, plan.direction, slopes))


def _drawn(directions: Directions) -> Directions:
    factors = directions.at(slice(None))
    for name, site in directions.sites.items():
        # Of a long parameter, a pass reads a few entries of what was drawn with the others.
        if not site.long:
            factors[name]
    return directions


@torch.no_grad()
def _update(params: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> None:
    # So small that the next round starts from the same weights.
    for name in gradient:
        if isinstance(gradient, DirectionGradient) and name in gradient.directions.entries:
            # As plain gradient descent is handed it.
            entries, grad = gradient.read(name)
            params[name].index_add_(0, entries, grad.to(params[name].dtype), alpha=-1e-9)
            continue
        with alike(params[name].dtype in SHORT):
            params[name].add_(update_of(gradient, name, params[name])[0], alpha=-1e-9)
