"""What a record keeps of an estimate, and the estimate that it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fwdlearn.allocator import Allocator
from fwdlearn.directions import Directions, ReadParams
from fwdlearn.engine.offload import on_device
from fwdlearn.estimator import Estimate
from fwdlearn.gradient import DirectionGradient, used_in
from fwdlearn.ledger.records import Record, packed
from fwdlearn.progress import Progress

if TYPE_CHECKING:
    from fwdlearn.trainer import Trainer


def estimate_of(record: Record, header: Mapping[str, Any], trainer: Trainer) -> Estimate:
    """The estimate that a record with coefficients holds.

    Without a forward pass; where its directions are about what the batch reads, the batch is taken
    and its entries are looked up.
    """
    assert record.coefficients is not None
    made = header["family"]
    params: Mapping[str, Tensor] = on_device(trainer.engine.params)
    if (listed := record.entries) is None:
        params = trainer.oracle(record.step - 1).params
    else:
        entries = {name: value.to(trainer.device) for name, value in listed.items()}
        params = ReadParams(params, lambda: entries)
    directions = Directions(
        trainer.step_key(record.step - 1),
        params,
        len(record.coefficients),
        made["law"],
        made["rank"],
        made["scales"],
    )
    coefficients = record.coefficients.to(directions.device)
    info: dict[str, Tensor] = {
        "variance": torch.tensor(record.variance, dtype=torch.float64),
        "nonfinite": torch.tensor(record.nonfinite),
    }
    loss = torch.tensor(record.loss, dtype=torch.float64)
    return Estimate(DirectionGradient(directions, coefficients), loss, record.queries, info)


class Taken(NamedTuple):
    """What the record of a step is made of: quickly taken, and little to keep.

    Args:
        step: from 1.
        queries: of the estimate.
        figures: of the estimate.
        fresh: whether nothing but weights and optimizer lasts to the next step.
        coefficients: along which the gradient is a sum, or None.
        named: whether the directions are those of the step's key, in every parameter.
        law, rank, scales: of them.
        reads: whether they are zero in tables but for what the batch reads.
    """

    step: int
    queries: int
    figures: tuple[float, float, int]
    fresh: bool
    coefficients: Tensor | None = None
    named: bool = False
    law: str = ""
    rank: int | None = None
    scales: Mapping[str, float] | None = None
    reads: bool = False


def taken(at: Progress, estimate: Estimate, trainer: Trainer, stayed: bool) -> Taken:
    """Of the step `at.step`.

    Args:
        at: with the states after the estimate.
        estimate: of the step.
        trainer: that makes the step.
        stayed: whether the engine is on the rung that it was on before the step.
    """
    fresh = stayed and at.state is None and at.plans is None
    begin = (at.step, estimate.queries, estimate.figures, fresh)
    grad = estimate.grad
    if type(grad) is not DirectionGradient or type(made := grad.directions) is not Directions:
        return Taken(*begin)
    about, every = made.params, trainer.engine.params
    named = about is every or about.keys() == every.keys()
    # Asked for here, where the trainer still knows it.
    named = named and made.key == trainer.step_key(at.step - 1)
    family = made.law, made.rank, made.scales
    return Taken(*begin, grad.coefficients, named, *family, bool(made.entries))


class Form(NamedTuple):
    """What a ledger and its trainer say of every record.

    Args:
        family: of the directions whose coefficients tell a gradient.
        dtype: that they are used in.
        lasting: whether the allocator is told of steps.
    """

    family: Mapping[str, Any] | None
    dtype: torch.dtype
    lasting: bool


def form_of(header: Mapping[str, Any], trainer: Trainer) -> Form:
    """Of the records of a ledger with that header."""
    dtype = used_in(value.dtype for value in trainer.engine.params.values())
    lasting = type(trainer.allocator).observe is not Allocator.observe
    return Form(header["family"], dtype, lasting)


def body_of(made: Taken, form: Form) -> bytes:
    """The record, as a ledger of that form has it."""
    coefficients = None
    if made.named and form.family is not None and made.coefficients is not None:
        if {"law": made.law, "rank": made.rank, "scales": made.scales} == form.family:
            # Nothing is lost.
            coefficients = made.coefficients.to("cpu", form.dtype)
    loss, variance, nonfinite = made.figures
    return packed(
        made.step,
        made.queries,
        nonfinite,
        loss,
        variance,
        coefficients is not None and made.fresh and not form.lasting,
        coefficients,
        None if made.reads and coefficients is not None else {},
    )
