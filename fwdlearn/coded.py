"""Normal noise of which the signs are kept and nothing else: one bit an entry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fwdlearn.noise import LAWS, SiteNoise, signs

# sign(z) times this has the mean product 1 with z.
FACTOR = math.sqrt(math.pi / 2)


@dataclass(frozen=True)
class SignedNoise(SiteNoise):
    """Normal numbers whose score is coded as their sign.

    The numbers go as soon as a forward pass has had them; their signs stay, packed, for the sum.
    On a linear loss the mean of coefficient times coded score is that of the exact score, with
    pi / 2 times its variance.

    Args:
        law: "gaussian" alone.
    """

    law: str = "gaussian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.law != "gaussian":
            raise ValueError(f"SignedNoise(law=...) must be 'gaussian', got {self.law!r}.")
        object.__setattr__(self, "_packed", {})

    @property
    def energy(self) -> float:
        return FACTOR**2

    @property
    def kept_bytes(self) -> int:
        """Bytes that the signs take so far."""
        packed: dict[str, tuple[Tensor, Tensor]] = self.__dict__["_packed"]
        return sum(words.nbytes for words, _ in packed.values())

    def times(self, name: str, ids: Tensor, factor: Tensor, score: bool = False) -> Tensor:
        shape = self.shape(name)
        if name not in self.names:
            return factor.new_zeros(len(ids), *shape)
        if not score:
            numbers = self._numbers(name, ids)
            self._keep(name, ids, numbers)
            out = numbers.to(factor.dtype).mul_(factor.unsqueeze(1))
            return out[:, : math.prod(shape)].reshape(len(ids), *shape)
        words, seen = self._of(name, ids.device)
        new = ids[~seen[ids]]
        if len(new):
            self._keep(name, new, self._numbers(name, new))
        coded = FACTOR * factor
        if factor.dtype == torch.float32:
            out = signs(words[ids], coded)
        else:
            out = LAWS["rademacher"].expand(words[ids], factor.dtype) * coded.unsqueeze(1)
        return out[:, : math.prod(shape)].reshape(len(ids), *shape)

    def _numbers(self, name: str, ids: Tensor) -> Tensor:
        """float32 [n, at least as many as an output has]."""
        return self._drawn(ids, self._blocks[name]).flatten(1)

    def _of(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        packed: dict[str, tuple[Tensor, Tensor]] = self.__dict__["_packed"]
        if name not in packed:
            blocks = -(-math.prod(self.shape(name)) // 128)
            with torch.inference_mode(False):
                words = torch.zeros(self.count, blocks, 4, dtype=torch.int32, device=device)
                packed[name] = words, torch.zeros(self.count, dtype=torch.bool, device=device)
        return packed[name]

    def _keep(self, name: str, ids: Tensor, numbers: Tensor) -> None:
        """Bit k of a direction's words, counted from the least significant, is its number k."""
        words, seen = self._of(name, ids.device)
        bits = torch.zeros(len(ids), words.shape[1] * 128, dtype=torch.int32, device=ids.device)
        bits[:, : numbers.shape[1]] = (numbers > 0)[:, : bits.shape[1]]
        shifts = torch.arange(32, dtype=torch.int32, device=ids.device)
        packed = (bits.view(len(ids), -1, 4, 32) << shifts).sum(-1, dtype=torch.int32)
        words[ids], seen[ids] = packed, True
