"""Where a search for sigma and the learning rate begins, when a recipe names neither.

Published settings that work, and those of the shipped recipes, follow few rules.

| trained part | sigma | learning rate of SGD, one direction a step |
|---|---|---|
| all weights, d of them | 1e-3 | 0.45 / d^(2/3), at least 1e-7 |
| a head: at most a twentieth of the weights | 1e-2 | the same |
| scales of a quantised model | 1e-2 | the same |
| adapters | 1e-2 | 7e-5 |
| a prompt or a prefix | 1e-1 | 3e-3 |

Anchors for SGD: a network of 29,000 weights at 1e-2 along 20 directions (DeComFL, its momentum
counted in), OPT-125M at 5e-6 to 1e-5 along 5 (DeComFL), RoBERTa-large at 1e-7 to 1e-5, OPT of 1.3 B
and more at 1e-7 to 1e-6, adapters at 5e-5 to 1e-4, prefixes at 1e-3 to 1e-2 (all MeZO, one
direction; sigma theirs). Of N independent directions a step the estimate has an N-th of the noise,
and the rate is N times as large, 0.1 at most; momentum m divides it by 1 / (1 - m).

Optimizers that divide by the size of the gradient move every weight by about the rate, whatever N
is: 0.6 / sqrt(d), 2e-2 at most. Anchors: shipped recipes (1e-2 at 5,000 weights, 3e-3 at 37,000,
2e-3 at 114,000) and FZOO, 5e-5 at 125 to 355 million.

In bfloat16 sigma is at least 1e-2, since less is lost in rounding (docs/low-precision.md).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

SIGMAS = {
    "all weights": 1e-3,
    "a head": 1e-2,
    "scales": 1e-2,
    "adapters": 1e-2,
    "a prompt": 1e-1,
}
_FLAT = {"adapters": 7e-5, "a prompt": 3e-3}
_PLAIN = ("SGD", "ASGD")
_NORMALISED = (
    "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adafactor", "RMSprop", "Adagrad", "NormalizedSGD"
)  # fmt: skip


@dataclass(frozen=True)
class Default:
    """A number and why.

    Args:
        value: positive.
        reason: one line, without the number.
    """

    value: float
    reason: str


def trained_part(names: Collection[str], entries: int, total: int) -> str:
    """What kind of part of a model is trained: a key of `SIGMAS`.

    Args:
        names: of the trained parameters.
        entries: numbers in them, at least 1.
        total: numbers in all parameters of the model.
    """
    for part, marks in (
        ("adapters", ("lora_", "adapter", "ia3_", "vera_", "hada_")),
        ("a prompt", ("prompt", "prefix")),
        ("scales", (".factor",)),
    ):
        if any(mark in name for name in names for mark in marks):
            return part
    return "a head" if 20 * entries <= total else "all weights"


def default_sigma(part: str, dtype: torch.dtype) -> Default:
    """Of noise on weights.

    Args:
        part: a key of `SIGMAS`.
        dtype: that the model computes in.
    """
    value, why = SIGMAS[part], f"{part} in {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and value < 1e-2:
        return Default(1e-2, f"{why}, where less is lost in rounding")
    return Default(value, why)


def default_rate(
    optimizer: str, part: str, entries: int, directions: float = 1, momentum: float = 0.0
) -> Default | None:
    """None for an optimizer of which nothing is known.

    Args:
        optimizer: its short name.
        part: a key of `SIGMAS`.
        entries: trained numbers, at least 1.
        directions: independent ones a step, at least 1.
        momentum: of SGD, in [0, 1).
    """
    many = f"{entries:,} trained numbers" if entries > 1 else "one trained number"
    if optimizer in _NORMALISED:
        rule = f"{optimizer}: 0.6 over the root of {many}, 2e-2 at most"
        return Default(min(2e-2, 0.6 / entries**0.5), rule)
    if optimizer not in _PLAIN:
        return None
    one = _FLAT.get(part, max(1e-7, 0.45 / entries ** (2 / 3)))
    rule = f"{part}, {many}" if part not in _FLAT else part
    if directions > 1:
        rule += f", {directions:,.0f} directions a step"
    return Default(min(0.1, one * directions * (1 - momentum)), f"{optimizer}: {rule}")
