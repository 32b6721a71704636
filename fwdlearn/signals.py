"""What an allocator may read of a batch before its queries are divided, by name.

`example` and `target` are known without the model. The others come from one clean pass, one query
a row; an estimator that wants the clean losses too is answered from the same pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.engine.measured import Measured
from fwdlearn.errors import UsageError

SIGNALS: Mapping[str, str] = {
    "loss": "float [rows], the loss at the unperturbed point",
    "residual": "float [rows], the norm of softmax minus target, or of output minus values",
    "target": "int64 or float [rows, ...], the batch's targets",
    "example": "int64 [rows], the numbers of the rows within the training data",
}
"""Name -> what it is."""

_OF_THE_MODEL = ("loss", "residual")


class Measuring(Protocol):
    """An oracle that runs the clean pass, counts it, and answers from it afterwards."""

    def measure(self, residual: bool, keep: bool = False) -> Measured:
        """The clean pass of the batch.

        Args:
            residual: whether the residual is wanted.
            keep: whether a later `clean()` wants inputs and outputs of layers, and is answered
                from here.
        """


def check_signals(owner: str, names: Iterable[str]) -> None:
    """Raises UsageError, naming `owner`, unless every name is one of `SIGNALS`."""
    for name in sorted(names):
        if name not in SIGNALS:
            raise UsageError(
                f"{owner} reads the signal {name!r}, which the trainer does not measure; it "
                f"measures {', '.join(SIGNALS)}."
            )


def measured(names: Iterable[str]) -> bool:
    """Whether some of the signals take a clean pass."""
    return any(name in _OF_THE_MODEL for name in names)


def read(
    names: Iterable[str], oracle: Measuring, batch: Batch, examples: Tensor, keep: bool = False
) -> dict[str, Tensor]:
    """The signals of a batch, on the CPU, where plans are made."""
    found: dict[str, Tensor] = {"target": batch.targets, "example": examples}
    if measured(names):
        clean = oracle.measure("residual" in names, keep)
        found |= {"loss": clean.losses}
        if clean.residual is not None:
            found |= {"residual": clean.residual}
    # Tensors of their own, which outlive inference mode and the batch.
    return {name: found[name].detach().cpu().clone() for name in names}
