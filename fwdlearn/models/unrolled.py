"""torch's recurrent layers as steps of plain operations, on the same weights, and back.

`nn.RNN`, `nn.GRU` and `nn.LSTM` run as one operation each, into which no perturbation reaches and
for which torch has no forward mode. `unroll` puts `Unrolled` in their place, `roll` puts them back.
Parameters are shared and keep their names, so that what is trained in one form is trained in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fwdlearn.errors import UsageError
from fwdlearn.models.built import weights_from
from fwdlearn.models.cells import KINDS, Kind, Memory, scan
from fwdlearn.models.recurrent import State

_SIZES = ("input_size", "hidden_size", "num_layers", "proj_size")
_OPTIONS = ("bias", "batch_first", "dropout", "bidirectional")


class Unrolled(nn.Module):
    """What an `nn.RNN`, `nn.GRU` or `nn.LSTM` computes, in the same form and on its weights.

    Args:
        module: whose parameters are taken over: the same objects, under the same names.

    Raises:
        UsageError: the module is no plain layer of the three kinds.
    """

    input_size: int
    hidden_size: int
    num_layers: int
    proj_size: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.kind = module.mode, _kind(module)
        # Under their own names, because models ask their layers for them.
        for name in (*_SIZES, *_OPTIONS):
            setattr(self, name, getattr(module, name))
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.training = module.training

    @property
    def output_size(self) -> int:
        """Numbers that one direction puts out."""
        return self.proj_size or self.hidden_size

    def flatten_parameters(self) -> None:
        """Nothing: weights are used as they lie."""

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """See the layer in whose place this one stands; packed sequences are refused.

        Raises:
            UsageError: a packed sequence.
        """
        if isinstance(input, PackedSequence):
            raise UsageError(
                f"{self.mode} unrolled takes padded tensors and no PackedSequence; give it the "
                "padded tensor, and leave the steps after a row's end out of the loss."
            )
        single = input.dim() == 2
        x = input.unsqueeze(0 if self.batch_first else 1) if single else input
        x = x if self.batch_first else x.transpose(0, 1)
        first = self._split(hx, single, x)
        last: list[Memory] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = F.dropout(x, self.dropout, True)
            out = []
            for reverse in self._directions():
                steps, memory = self._along(x, layer, reverse, first[len(last)])
                out.append(torch.stack(steps, 1))
                last.append(memory)
            x = out[0] if len(out) == 1 else torch.cat(out, 2)
        x = x if self.batch_first else x.transpose(0, 1)
        if single:
            x = x.squeeze(0 if self.batch_first else 1)
        final = [torch.stack(values) for values in zip(*last, strict=True)]
        final = [value.squeeze(1) for value in final] if single else final
        return x, final[0] if len(final) == 1 else tuple(final)

    def initial(self, rows: int) -> State:
        """The state before the first step: zeros [rows, width], named `LAYER.SLOT`."""
        weight = self._parameters["weight_hh_l0"]
        assert weight is not None
        zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
        return {
            f"{layer}.{slot}": value
            for layer in range(self.num_layers)
            for slot, value in zip(self.kind.slots, self._zeros(zero, rows), strict=True)
        }

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step.

        Args:
            x: [rows, input_size].
            state: from `initial` or the step before.

        Returns:
            What goes out, [rows, output_size], and the next state.

        Raises:
            UsageError: the layer is bidirectional and reads the future.
        """
        if self.bidirectional:
            raise UsageError(
                f"a bidirectional {self.mode} has no steps: its backward direction begins at the "
                "end of the sequence. Call it on whole sequences."
            )
        after: State = {}
        for layer in range(self.num_layers):
            memory = tuple(state[f"{layer}.{slot}"] for slot in self.kind.slots)
            if layer and self.dropout and self.training:
                x = F.dropout(x, self.dropout, True)
            _, memory = self._along(x.unsqueeze(1), layer, False, memory)
            after |= {f"{layer}.{s}": m for s, m in zip(self.kind.slots, memory, strict=True)}
            x = memory[0]
        return x, after

    def extra_repr(self) -> str:
        settings = {name: getattr(self, name) for name in (*_SIZES, *_OPTIONS)}
        given = ", ".join(f"{name}={value}" for name, value in settings.items() if value)
        return f"{self.mode}, {given}"

    def rolled(self) -> nn.RNNBase:
        """torch's own layer on the same parameters."""
        settings = {name: getattr(self, name) for name in (*_SIZES, *_OPTIONS)}
        if not self.proj_size:
            del settings["proj_size"]
        # Its own weights are never made.
        with weights_from(0):
            made: nn.RNNBase = _CLASSES[self.mode](**settings, device="meta")
        for name, parameter in self.named_parameters(recurse=False):
            setattr(made, name, parameter)
        made.train(self.training)
        made.flatten_parameters()
        return made

    def _along(
        self, x: Tensor, layer: int, reverse: bool, memory: Memory
    ) -> tuple[list[Tensor], Memory]:
        suffix = f"l{layer}{'_reverse' if reverse else ''}"

        def part(name: str) -> Tensor | None:
            return self._parameters.get(f"{name}_{suffix}")

        w, u, p = part("weight_ih"), part("weight_hh"), part("weight_hr")
        assert w is not None and u is not None
        a = F.linear(x, w, part("bias_ih"))
        recurrent = partial(F.linear, weight=u, bias=part("bias_hh"))
        project = None if p is None else partial(F.linear, weight=p)
        return scan(self.kind, a, recurrent, memory, reverse, project)

    def _directions(self) -> tuple[bool, ...]:
        return (False, True) if self.bidirectional else (False,)

    def _zeros(self, like: Tensor, rows: int) -> Memory:
        widths = [self.output_size, *[self.hidden_size] * (len(self.kind.slots) - 1)]
        return tuple(like.new_zeros(rows, width) for width in widths)

    def _split(self, hx: Any, single: bool, x: Tensor) -> list[Memory]:
        """The memory of each layer and direction before the first step."""
        count = self.num_layers * len(self._directions())
        if hx is None:
            return [self._zeros(x, len(x)) for _ in range(count)]
        given = hx if isinstance(hx, tuple) else (hx,)
        given = tuple(value.unsqueeze(1) for value in given) if single else given
        return list(zip(*(value.unbind(0) for value in given), strict=True))


def unroll(module: nn.Module) -> nn.Module:
    """A copy in which every `nn.RNN`, `nn.GRU` and `nn.LSTM` is written out step by step.

    Parameters and buffers of the copy are those of the module, the same objects: training one
    trains the other. Everything else is copied.

    Args:
        module: such a layer, or a module that holds some, however deep.

    Returns:
        An `Unrolled`, or a module of the same class. Outputs agree to rounding.

    Raises:
        UsageError: there is no such layer, or one is of a class of its own.

    Example:
        >>> layer = nn.LSTM(3, 4, batch_first=True)
        >>> x = torch.ones(2, 5, 3)
        >>> torch.allclose(unroll(layer)(x)[0], layer(x)[0], atol=1e-6)
        True
    """
    made, count = _replaced(
        module, lambda one: Unrolled(one) if isinstance(one, nn.RNNBase) else None
    )
    if not count:
        raise UsageError(
            f"unroll({type(module).__name__}) finds no nn.RNN, nn.GRU or nn.LSTM; a model without "
            "them needs no unrolling."
        )
    return made


def roll(module: nn.Module) -> nn.Module:
    """A copy with torch's own layers in the place of unrolled ones; the way back from `unroll`.

    Parameters and buffers are shared as they are there.

    Raises:
        UsageError: nothing in the module is unrolled.
    """
    made, count = _replaced(module, lambda one: one.rolled() if type(one) is Unrolled else None)
    if not count:
        raise UsageError(
            f"roll({type(module).__name__}) finds nothing that unroll has made; there is no way "
            "back to be gone."
        )
    return made


_CLASSES: Mapping[str, Callable[..., nn.RNNBase]] = {
    "RNN_TANH": nn.RNN,
    "RNN_RELU": partial(nn.RNN, nonlinearity="relu"),
    "GRU": nn.GRU,
    "LSTM": nn.LSTM,
}
_KINDS = {"RNN_TANH": "elman", "RNN_RELU": "elman-relu", "GRU": "gru", "LSTM": "lstm"}


def _kind(module: nn.RNNBase) -> Kind:
    if type(module) in (nn.RNN, nn.GRU, nn.LSTM):
        return KINDS[_KINDS[module.mode]]
    raise UsageError(
        f"unroll knows nn.RNN, nn.GRU and nn.LSTM, and {type(module).__name__} is a class of its "
        "own, which may compute something else."
    )


def _replaced(
    module: nn.Module, other: Callable[[nn.Module], nn.Module | None]
) -> tuple[nn.Module, int]:
    """A copy that shares parameters and buffers, with modules replaced; and how many were.

    A module that is found in several places is one in the copy too.
    """
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    count = 0
    for one in list(module.modules()):
        new = other(one)
        if new is not None:
            memo[id(one)] = new
            count += 1
    return copy.deepcopy(module, memo), count
