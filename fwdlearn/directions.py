"""Random directions: tangents of the parameters, named by a key and a number, drawn at will.

A direction is never stored whole. A matrix gets a low-rank product of two thin factors, a vector
its own entries, and `rank=None` gives every tensor independent entries. Whatever the kind, the
covariance of a direction is the identity, so that the mean of `(g . E) E` is `g`.
"""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.keys import Key, stream_id

# Numbers of a family that are kept between the forward passes and the update, in bytes.
_KEEP_BYTES = 256 * 2**20
# Numbers expanded at once, so that building a gradient needs little beside the gradient.
_EXPAND_BYTES = 16 * 2**20


class Law(ABC):
    """How random words become numbers of mean 0 and variance 1.

    `raw` is the compact form that is kept, `expand` makes floating-point numbers of it.
    """

    name: ClassVar[str]
    numbers_per_block: ClassVar[int]
    raw_bytes_per_block: ClassVar[int]

    @abstractmethod
    def raw(self, words: Tensor) -> Tensor:
        """int64 [count, blocks, 4] -> the kept form [count, blocks, ...]."""

    @abstractmethod
    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The kept form -> [count, blocks * numbers_per_block] of `dtype`."""


class Rademacher(Law):
    """+1 or -1 with equal probability: one bit a number, the same on every machine."""

    name = "rademacher"
    numbers_per_block = 128
    raw_bytes_per_block = 16

    def raw(self, words: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 8, device=words.device)
        return ((words.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8).flatten(2)

    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        signs = torch.nn.functional.embedding(raw.int(), _sign_table(dtype, raw.device))
        return signs.flatten(1)


class Gaussian(Law):
    """Standard normal by Box-Muller: exact per backend, equal to rounding between backends."""

    name = "gaussian"
    numbers_per_block = 4
    raw_bytes_per_block = 16

    def raw(self, words: Tensor) -> Tensor:
        # Half a step off the grid keeps the logarithm finite.
        uniform = (words.double() + 0.5) / 2**32
        radius = torch.sqrt(-2 * torch.log(uniform[..., 0::2]))
        angle = 2 * math.pi * uniform[..., 1::2]
        pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
        return pair.flatten(2).float()

    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        return raw.flatten(1).to(dtype)


LAWS: Mapping[str, Law] = {law.name: law for law in (Rademacher(), Gaussian())}


@lru_cache
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the eight signs of a byte, lowest bit first."""
    with torch.inference_mode(False):
        bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
        return (2 * bits - 1).to(device, dtype)


@dataclass(frozen=True)
class Site:
    """Where the numbers of one parameter lie in its family, and what they form.

    Args:
        name: the parameter's name, which also names its random stream.
        shape: the parameter's shape.
        dtype: of the factors; the parameter's own, so that what is measured is what is applied.
        rank: of the product; 0 for independent entries.
        scale: size of the direction here, relative to the rest.
        start: first block of the family that belongs to this parameter.
        blocks: how many there are.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    rank: int
    scale: float
    start: int
    blocks: int

    @property
    def matrix(self) -> tuple[int, int]:
        """The parameter as (m, n): leading ones dropped, trailing dimensions flattened."""
        return _as_matrix(self.shape)


def _as_matrix(shape: torch.Size) -> tuple[int, int]:
    sizes = list(shape)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes = sizes[1:]
    return (sizes[0], math.prod(sizes[1:])) if sizes else (1, 1)


@dataclass(frozen=True)
class LowRank:
    """Factors of E = left @ right.T * scale, for each of `count` directions.

    Args:
        left: [count, m, rank].
        right: [count, n, rank].
        scale: 1 / sqrt(rank), which makes the covariance the identity, times the site's own.
    """

    left: Tensor
    right: Tensor
    scale: float

    def dense(self) -> Tensor:
        """[count, m, n]."""
        return (self.left @ self.right.transpose(1, 2)).mul_(self.scale)

    def square_norm(self) -> Tensor:
        """float64 [count], |E|^2 without forming E."""
        left, right = self.left.double(), self.right.double()
        gram = (left.transpose(1, 2) @ left) * (right.transpose(1, 2) @ right)
        return gram.sum((1, 2)) * self.scale**2


@dataclass(frozen=True)
class Directions:
    """A family of `count` random directions of `params`.

    Args:
        key: names the family. The same key gives the same directions on any machine.
        params: name -> tensor; only shapes, dtypes and devices are read.
        count: how many directions, numbered from 0.
        law: "rademacher" or "gaussian".
        rank: of the directions of matrices (at least 1), or None for independent entries.
        scales: name -> size of the directions in that parameter; 1 where a name is missing.

    Example:
        >>> family = Directions(Key.root(0), {"w": torch.zeros(3, 2)}, count=4)
        >>> family.dense("w", torch.tensor([2])).shape
        torch.Size([1, 3, 2])
    """

    key: Key
    params: Mapping[str, Tensor]
    count: int
    law: str = "rademacher"
    rank: int | None = 1
    scales: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_law(type(self).__name__, self.law, self.rank)

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        per_block = LAWS[self.law].numbers_per_block
        sites, start = {}, 0
        for name, value in self.params.items():
            m, n = _as_matrix(value.shape)
            # A product with a side of length one is no shorter than the entries themselves.
            rank = 0 if self.rank is None or min(m, n) == 1 else self.rank
            numbers = rank * (m + n) if rank else m * n
            blocks = -(-numbers // per_block)
            scale = (self.scales or {}).get(name, 1.0)
            sites[name] = Site(name, value.shape, value.dtype, rank, scale, start, blocks)
            start += blocks
        return sites

    @cached_property
    def bytes_per_direction(self) -> int:
        """Bytes that one direction takes while it is kept."""
        return LAWS[self.law].raw_bytes_per_block * sum(s.blocks for s in self.sites.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    def factors(self, name: str, ids: Tensor) -> LowRank | Tensor:
        """What perturbs one parameter: `LowRank`, or [len(ids), *shape] where it is dense."""
        site = self.sites[name]
        numbers = LAWS[self.law].expand(self._raw(site, ids), site.dtype)
        m, n = site.matrix
        if not site.rank:
            dense = numbers[:, : m * n].reshape(-1, *site.shape)
            return dense if site.scale == 1 else dense * site.scale
        left, right = numbers[:, : site.rank * (m + n)].split((site.rank * m, site.rank * n), 1)
        shape = (len(ids), -1, site.rank)
        return LowRank(left.reshape(shape), right.reshape(shape), site.rank**-0.5 * site.scale)

    def dense(self, name: str, ids: Tensor) -> Tensor:
        """[len(ids), *shape]: the directions of one parameter written out, in its dtype."""
        factors = self.factors(name, ids)
        if isinstance(factors, Tensor):
            return factors
        return factors.dense().reshape(-1, *self.sites[name].shape)

    def square_norms(self, ids: Tensor) -> Tensor:
        """float64 [len(ids)]: |E|^2 over all parameters."""
        total = torch.zeros(len(ids), dtype=torch.float64, device=self.device)
        for name, site in self.sites.items():
            if self.law == Rademacher.name and site.rank <= 1:
                total += math.prod(site.shape) * site.scale**2
                continue
            for chunk in self.chunks(name, len(ids)):
                factors = self.factors(name, ids[chunk])
                if isinstance(factors, Tensor):
                    total[chunk] += factors.double().reshape(len(factors), -1).square().sum(1)
                else:
                    total[chunk] += factors.square_norm()
        return total

    def chunks(self, name: str, count: int) -> Iterator[slice]:
        """Slices of `count` directions whose numbers for `name` fit in a fixed space."""
        m, n = self.sites[name].matrix
        rank = self.sites[name].rank
        numbers = rank * (m + n) if rank else m * n
        size = max(1, _EXPAND_BYTES // (4 * numbers))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def _raw(self, site: Site, ids: Tensor) -> Tensor:
        if self.bytes_per_direction * self.count > _KEEP_BYTES:
            return self._generate(ids, site.start, site.start + site.blocks)
        return self._kept[ids, site.start : site.start + site.blocks]

    @cached_property
    def _kept(self) -> Tensor:
        blocks = sum(site.blocks for site in self.sites.values())
        return self._generate(torch.arange(self.count, device=self.device), 0, blocks)

    @cached_property
    def _counters(self) -> tuple[Tensor, Tensor, Tensor]:
        block, low, high = [], [], []
        for site in self.sites.values():
            words = stream_id(site.name)
            block.append(torch.arange(site.blocks))
            low.append(torch.full((site.blocks,), words[0]))
            high.append(torch.full((site.blocks,), words[1]))
        return tuple(torch.cat(part).to(self.device) for part in (block, low, high))  # type: ignore[return-value]

    def _generate(self, ids: Tensor, start: int, stop: int) -> Tensor:
        law = LAWS[self.law]
        # The buffers outlive inference mode: an optimizer may work on them in place.
        with torch.inference_mode(False):
            block, low, high = (part[start:stop] for part in self._counters)
            size = max(1, _EXPAND_BYTES // (64 * max(1, stop - start)))
            parts = []
            for chunk in ids.split(size):
                words = self.key.words(block, chunk.unsqueeze(1), (low, high))
                parts.append(law.raw(words))
            return torch.cat(parts)


def scales_of(
    owner: str, patterns: Mapping[str, float] | None, names: Iterable[str]
) -> dict[str, float]:
    """The size of directions in each parameter: that of the first pattern that its name matches.

    Raises:
        UsageError: a pattern matches no name.
    """
    names = list(names)
    found: dict[str, float] = {}
    for pattern, scale in reversed(list((patterns or {}).items())):
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise UsageError(
                f"{owner}(scales=...): the pattern {pattern!r} matches no parameter; the first "
                f"are {', '.join(names[:3])}."
            )
        found |= dict.fromkeys(matches, scale)
    return found


def check_law(owner: str, law: str, rank: int | None) -> None:
    """Raises ValueError, naming `owner`, unless `law` and `rank` describe directions."""
    if law not in LAWS:
        raise ValueError(f"{owner}(law=...) must be one of {', '.join(LAWS)}, got {law!r}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"{owner}(rank=...) must be a positive integer, or None for independent entries, "
            f"got {rank!r}."
        )
