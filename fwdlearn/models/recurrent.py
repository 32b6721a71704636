"""Recurrent networks, written step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fwdlearn.data.types import DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.models.built import Built, weights_from
from fwdlearn.models.cells import KINDS, Kind, Memory, scan
from fwdlearn.models.decorrelation import decorrelated

State = dict[str, Tensor]
"""What a network carries from step to step: name -> [rows, ...]."""


class Cell(nn.Module):
    """One layer: `input` is W and b, `recurrent` is U and c; see `fwdlearn.models.cells`."""

    def __init__(self, kind: Kind, inputs: int, width: int, bias: bool) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.input = nn.Linear(inputs, kind.gates * width, bias=bias)
        self.recurrent = nn.Linear(width, kind.gates * width, bias=bias)
        # As torch draws the weights of its own recurrent layers.
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(width), 1 / math.sqrt(width))

    @torch.no_grad()
    def remember(self, steps: int) -> None:
        """Draws what decides how long units remember anew.

        With gates, their biases, so that units keep what they hold for 2 to `steps` steps (C.
        Tallec and Y. Ollivier, "Can recurrent neural networks warp time?", arXiv 1804.11188).
        Without, the recurrent weights: a rotation, or for relu the identity (Q. Le, N. Jaitly and
        G. Hinton, "A simple way to initialize recurrent networks of rectified linear units", arXiv
        1504.00941), times 1 - 1 / steps.
        """
        if not self.kind.keeps:
            weight = self.recurrent.weight
            (nn.init.eye_ if self.kind is KINDS["elman-relu"] else nn.init.orthogonal_)(weight)
            weight.mul_(1 - 1 / steps)
            return
        bias = torch.log(1 + (steps - 2) * torch.rand(self.width))
        for part, sign in self.kind.keeps:
            place = slice(part * self.width, (part + 1) * self.width)
            self.input.bias[place] = sign * bias
            self.recurrent.bias[place] = 0

    def forward(self, x: Tensor, memory: Memory) -> Memory:
        return self.kind.rule(self.input(x), self.recurrent(memory[0]), memory)


class Recurrent(nn.Module):
    """Layers of cells and a linear readout.

    Args:
        cell: a key of `fwdlearn.models.cells.KINDS`.
        inputs: numbers that come in at a step; or of different tokens, if `embedding` is given.
        widths: of each layer, at least one.
        outputs: numbers that go out at a step.
        last: whether `forward` gives what goes out at the last step alone.
        embedding: width of the vectors that stand for tokens, or None for numbers.
        bias: whether the linear layers have biases.
    """

    zero: Tensor

    def __init__(
        self,
        cell: str,
        inputs: int,
        widths: Sequence[int],
        outputs: int,
        last: bool = False,
        embedding: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.last = last
        self.embedding = None if embedding is None else nn.Embedding(inputs, embedding)
        below = [inputs if embedding is None else embedding, *widths[:-1]]
        kind = KINDS[cell]
        self.cells = nn.ModuleList(
            Cell(kind, m, n, bias) for m, n in zip(below, widths, strict=True)
        )
        self.head = nn.Linear(widths[-1], outputs, bias=bias)
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def initial(self, rows: int) -> State:
        """The state before the first step: zeros [rows, width], named `LAYER.SLOT`."""
        return {
            f"{number}.{slot}": self.zero.new_zeros(rows, cell.width)
            for number, cell in enumerate(self._cells())
            for slot in cell.kind.slots
        }

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step.

        Args:
            x: [rows, inputs], or int64 [rows] of tokens.
            state: from `initial` or the step before.

        Returns:
            What goes out, [rows, outputs], and the next state.
        """
        h = x if self.embedding is None else self.embedding(x)
        after: State = {}
        for number, cell in enumerate(self._cells()):
            memory = cell(h, self._memory(number, state))
            after |= {f"{number}.{s}": m for s, m in zip(cell.kind.slots, memory, strict=True)}
            h = memory[0]
        return self.head(h), after

    def forward(self, x: Tensor) -> Tensor:
        """All steps, from the initial state.

        Args:
            x: [rows, steps, inputs], or int64 [rows, steps] of tokens.

        Returns:
            [rows, steps, outputs]; [rows, outputs] of the last step if `last`.
        """
        state = self.initial(len(x))
        h = x if self.embedding is None else self.embedding(x)
        for number, cell in enumerate(self._cells()):
            out, _ = scan(cell.kind, cell.input(h), cell.recurrent, self._memory(number, state))
            if self.last and number == len(self.cells) - 1:
                return self.head(out[-1])
            h = torch.stack(out, 1)
        return self.head(h)

    def _memory(self, number: int, state: State) -> Memory:
        return tuple(state[f"{number}.{slot}"] for slot in self._cells()[number].kind.slots)

    def _cells(self) -> list[Cell]:
        return list(self.cells)  # type: ignore[arg-type]


def recurrent(
    info: DataInfo,
    cell: str = "gru",
    hidden: Sequence[int] = (64,),
    embedding: int = 32,
    bias: bool = True,
    remember: int | None = None,
    decorrelation: float | None = None,
    seed: int = 0,
) -> Built:
    """Builds a recurrent network for sequences.

    What goes out is there at every step if the data has a target there, else at the last step.

    Args:
        info: of the data; kind `sequence` or `tokens`.
        cell: `elman`, `elman-relu`, `gru`, `lstm` or `minimal`.
        hidden: width of each layer, at least one number and each at least 1.
        embedding: width of the vectors that stand for tokens, at least 1.
        bias: whether the linear layers have biases.
        remember: steps over which units remember at first, at least 2: biases of gates, or the
            recurrent weights where there are none, are drawn for that (see `Cell.remember`); None
            draws them like all others. Wanted where an answer comes long after what it is about.
        decorrelation: size of a step of the layers that decorrelate the inputs of the linear ones
            (1e-3 is a start), or None for no such layers.
        seed: of the weights, drawn as torch draws them for its recurrent layers.

    Raises:
        UsageError: the data are no sequences, or an argument is out of range.
    """
    if info.kind not in ("sequence", "tokens"):
        raise UsageError(
            f"recurrent reads sequences or tokens, not {info.kind}; data such as mackey_glass or "
            "sequential_digits has them."
        )
    if cell not in KINDS:
        raise UsageError(f"recurrent(cell=...) must be one of {', '.join(KINDS)}, got {cell!r}.")
    if not hidden or any(width < 1 for width in hidden):
        raise UsageError(
            f"recurrent(hidden=...) must hold one width or more, each at least 1, got "
            f"{list(hidden)!r}."
        )
    if embedding < 1:
        raise UsageError(f"recurrent(embedding=...) must be at least 1, got {embedding!r}.")
    if remember is not None and remember < 2:
        raise UsageError(f"recurrent(remember=...) must be at least 2, got {remember!r}.")
    if remember is not None and KINDS[cell].keeps and not bias:
        raise UsageError(
            f"recurrent(remember=...) draws the biases of the gates of {cell}; bias must be true."
        )
    inputs, width = info.shape[-1], None
    if info.kind == "tokens":
        inputs, width = info.outputs, embedding
    with weights_from(seed):
        made = Recurrent(cell, inputs, hidden, info.outputs, not info.per_step, width, bias)
        for layer in made.cells if remember is not None else ():
            assert isinstance(layer, Cell) and remember is not None
            layer.remember(remember)
        model = made if decorrelation is None else decorrelated(made, decorrelation)
        return Built(model.eval())
