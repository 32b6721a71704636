"""What noise changes at every layer: outputs of a noisy pass less those of the clean one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fwdlearn.engine.passes import Call
from fwdlearn.engine.trace import Rows
from fwdlearn.engine.visits import Noisy


@dataclass(frozen=True)
class Shift:
    """A block of noisy queries, measured.

    Args:
        queries: which ones, of those asked about.
        losses: [queries], float64 if the parameters are, else float32.
        outputs: name of a layer -> [queries, *shape], its output less the clean one of that row;
            float32 or wider.
    """

    queries: slice
    losses: Tensor
    outputs: Mapping[str, Tensor]


class Shifting(Noisy):
    """Adds noise and measures what has changed at every site, its own noise included.

    Args:
        row: int64 [queries], of the batch.
        clean: name of a site -> [rows, *shape].

    Attributes:
        shifts: name of a site -> [queries, *shape].
    """

    def __init__(self, *model: Any, row: Tensor, clean: Mapping[str, Tensor], **noise: Any) -> None:
        super().__init__(*model, **noise)
        self.row, self.clean = row, clean
        self.shifts: dict[str, Tensor] = {}

    def stop(self, site: str, call: Call, out: Tensor, where: Rows) -> Tensor:
        out = super().stop(site, call, out, where)
        # Before the model goes on, which may overwrite its own activations.
        seen = where.first(out, self.rows)
        wide = seen.to(torch.promote_types(seen.dtype, torch.float32))
        self.shifts[site] = wide - self.clean[site][self.row]
        return out
