"""What a ledger says of the run's beginning, and whether another beginning is the same."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fwdlearn
from fwdlearn.directions import Directions
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.ledger.snapshots import digest

if TYPE_CHECKING:
    from fwdlearn.trainer import Trainer

FORMAT = 1


def beginning(trainer: Trainer, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a run that is about to take its first step."""
    batch = trainer.batch(0)
    first = {
        **{f"args/{i}": value for i, value in enumerate(batch.args)},
        **{f"kwargs/{name}": value for name, value in batch.kwargs.items()},
        "targets": batch.targets,
    }
    key = Key.root(0).fold("ledger")
    return {
        "format": FORMAT,
        "fwdlearn": fwdlearn.__version__,
        "recipe": dict(recipe),
        "seed": trainer.seed,
        "weights": {name: digest(name, value) for name, value in tensors_of(trainer).items()},
        "rows": trainer.batch_size,
        "data": {
            "rows": len(trainer.data.train),
            "first": {name: digest(name, value) for name, value in first.items()},
        },
        # As JSON has it, so that it equals what is read.
        "info": json.loads(json.dumps(asdict(trainer.data.info))),
        "generator": {"name": "philox4x32-10", "test": [key.low, key.high]},
        "family": None,
        "machine": machine(trainer),
    }


def machine(trainer: Trainer) -> dict[str, Any]:
    """What may round otherwise than another."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": trainer.device,
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def moved(then: Mapping[str, Any], now: Mapping[str, Any], passes: bool = True) -> str:
    """How a machine differs from the one that a ledger was made on, or nothing.

    Args:
        then, now: of `machine`.
        passes: whether it makes forward passes too, which threads divide.
    """
    parts = [
        f"{name} was {value} and is {now.get(name)}"
        for name, value in then.items()
        if now.get(name) != value and (passes or name != "threads")
    ]
    return ", ".join(parts)


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    model = trainer.model
    return {
        **{name: value.detach() for name, value in model.named_parameters()},
        **dict(model.named_buffers()),
    }


def family(grad: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What the directions of a gradient are beside their key and count; None where they are not
    drawn, or the gradient is no sum of them."""
    if type(grad) is not DirectionGradient or type(grad.directions) is not Directions:
        return None
    made = grad.directions
    scales = None if made.scales is None else {k: float(v) for k, v in made.scales.items()}
    return {"law": made.law, "rank": made.rank, "scales": scales}


@dataclass(frozen=True)
class Difference:
    """How two beginnings differ.

    Args:
        fatal: what makes them two runs, or nothing.
        rounding: what may make them round otherwise, or nothing.
    """

    fatal: str
    rounding: str


def unlike(then: Mapping[str, Any], now: Mapping[str, Any]) -> Difference:
    """How the beginning that a ledger tells of differs from the one that was made now."""
    fatal = ""
    if then["format"] != FORMAT:
        fatal = f"its ledger has format {then['format']}, and this version reads {FORMAT}"
    elif then["weights"] != now["weights"]:
        every = {**then["weights"], **now["weights"]}
        first = next(n for n in every if then["weights"].get(n) != now["weights"].get(n))
        fatal = f"the model's first weights are not those that it began with ({first} differs)"
    elif then["data"] != now["data"] or then["rows"] != now["rows"]:
        fatal = "the training rows are not those that it began with"
    elif then["generator"] != now["generator"]:
        fatal = "random numbers are drawn otherwise than then"
    return Difference(fatal, moved(then["machine"], now["machine"]))
