"""Recurrent cells, one step at a time, of plain operations.

Papers: J. Elman, "Finding structure in time" (1990); K. Cho et al., "Learning phrase
representations using RNN encoder-decoder" (arXiv 1406.1078), GRU; S. Hochreiter and J. Schmidhuber,
"Long short-term memory" (1997); G.-B. Zhou et al., "Minimal gated unit for recurrent neural
networks" (arXiv 1603.09420).

With a = W x + b and r = U h + c, both cut in as many parts as the cell has gates, h the old output
and s the logistic function:

    elman     h' = f(a + r)
    gru       g = s(a_g + r_g),  z = s(a_z + r_z),  n = tanh(a_n + g r_n),  h' = n + z (h - n)
    lstm      i, f, o = s(a + r),  m' = f m + i tanh(a_n + r_n),  h' = o tanh(m')
    minimal   f = s(a_f + r_f),  n = tanh(a_n + f r_n),  h' = h + f (n - h)

Parts come in torch's order: g, z, n and i, f, n, o. Differs from the papers in: GRU and minimal
cells gate U h, as torch's GRU does, where the papers gate h, so that a step is one product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Memory = tuple[Tensor, ...]
"""What a cell carries from step to step: its output [rows, width], and what else it needs."""

Rule = Callable[[Tensor, Tensor, Memory], Memory]
"""(a, r, memory) -> the next memory, its output first."""


@dataclass(frozen=True)
class Kind:
    """A kind of cell.

    Args:
        rule: one step.
        gates: parts of a and r.
        slots: what the memory holds, its output first.
        keeps: parts that decide what is kept, and whether a large one keeps (1) or lets go (-1).
    """

    rule: Rule
    gates: int
    slots: tuple[str, ...] = ("h",)
    keeps: tuple[tuple[int, int], ...] = ()


def _elman(activation: Callable[[Tensor], Tensor]) -> Rule:
    def rule(a: Tensor, r: Tensor, memory: Memory) -> Memory:
        return (activation(a + r),)

    return rule


def _gru(a: Tensor, r: Tensor, memory: Memory) -> Memory:
    (h,) = memory
    (a_g, a_z, a_n), (r_g, r_z, r_n) = a.chunk(3, -1), r.chunk(3, -1)
    g, z = torch.sigmoid(a_g + r_g), torch.sigmoid(a_z + r_z)
    n = torch.tanh(a_n + g * r_n)
    return (n + z * (h - n),)


def _lstm(a: Tensor, r: Tensor, memory: Memory) -> Memory:
    m = memory[1]
    i, f, n, o = (a + r).chunk(4, -1)
    m = torch.sigmoid(f) * m + torch.sigmoid(i) * torch.tanh(n)
    return torch.sigmoid(o) * torch.tanh(m), m


def _minimal(a: Tensor, r: Tensor, memory: Memory) -> Memory:
    (h,) = memory
    (a_f, a_n), (r_f, r_n) = a.chunk(2, -1), r.chunk(2, -1)
    f = torch.sigmoid(a_f + r_f)
    return (h + f * (torch.tanh(a_n + f * r_n) - h),)


KINDS: Mapping[str, Kind] = {
    "elman": Kind(_elman(torch.tanh), 1),
    "elman-relu": Kind(_elman(torch.relu), 1),
    "gru": Kind(_gru, 3, keeps=((1, 1),)),
    "lstm": Kind(_lstm, 4, ("h", "m"), keeps=((0, -1), (1, 1))),
    "minimal": Kind(_minimal, 2, keeps=((0, -1),)),
}


def scan(
    kind: Kind,
    a: Tensor,
    recurrent: Callable[[Tensor], Tensor],
    memory: Memory,
    backwards: bool = False,
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], Memory]:
    """One layer along a sequence.

    Args:
        a: W x + b of every step, [rows, steps, gates * width]: one product instead of many.
        recurrent: h -> U h + c.
        memory: before the first step.
        backwards: from the last step to the first.
        project: what becomes of the output before anything else sees it.

    Returns:
        The output at each step, in the order of `a`, and the memory after the last one taken.
    """
    steps, out = list(a.unbind(1)), []
    for a_t in reversed(steps) if backwards else steps:
        memory = kind.rule(a_t, recurrent(memory[0]), memory)
        if project is not None:
            memory = (project(memory[0]), *memory[1:])
        out.append(memory[0])
    return out[::-1] if backwards else out, memory
