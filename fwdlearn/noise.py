"""Noise at the outputs of layers: named by a key and a number, or given as numbers.

Number i of the noise of a layer is one row of its output, of mean 0 and variance 1 in every entry.
A query that has it at scale s sees `output + s * size * number`, where the layer's own size is 1
unless `scales` says otherwise. An estimate of the gradient with respect to the output is a sum of
coefficient times score, `NoiseSum`; both are streamed and need no memory that grows with queries.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.keys import Key, stream_id
from fwdlearn.laws import LAWS as DIRECTION_LAWS
from fwdlearn.laws import Law

# Random words that are kept between the forward passes and the sum, in bytes.
_KEEP_BYTES = 64 * 2**20
# Random words made at once: enough to keep every core busy, little beside an activation.
_WORDS = 2**18
# Numbers expanded at once: what a cache holds on a CPU, what fills a GPU.
_NUMBERS = {"cpu": 2**19}
# A query takes no fewer of them: a whole block of random words is expanded.
_BLOCK = 128


@dataclass(frozen=True)
class Output:
    """What a layer puts out.

    Args:
        shape: of one row.
        dtype: of its numbers.
        params: the parameters whose gradient its cotangent feeds.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    params: tuple[str, ...]


class Laplace(Law):
    """Two-sided exponential of variance 1: the score is sqrt(2) times the sign."""

    name = "laplace"
    numbers_per_block = 4
    raw_bytes_per_block = 16

    def raw(self, words: Tensor) -> Tensor:
        # One bit for the sign; half a step off the grid keeps the logarithm finite.
        size = torch.log(((words >> 1).double() + 0.5) / 2**31) * -math.sqrt(0.5)
        return torch.where((words & 1).bool(), size, -size).float()

    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        return raw.flatten(1).to(dtype)

    def pick(self, raw: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        return raw.flatten(1).gather(1, index).to(dtype)


LAWS: Mapping[str, Law] = {**DIRECTION_LAWS, Laplace.name: Laplace()}


class Noise(ABC):
    """Numbers for the outputs of some layers.

    Attributes:
        count: how many there are for each layer, numbered from 0.
        scales: name -> size of the noise there; 1 where a name is missing.
    """

    count: int
    scales: Mapping[str, float] | None

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The layers that get noise."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of one number."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """In which sums at a layer run: float32, or float64 where its output is."""

    @abstractmethod
    def times(self, name: str, ids: Tensor, factor: Tensor, score: bool = False) -> Tensor:
        """Factor times number, without the layer's size.

        Args:
            ids: int64 [n].
            factor: float32 or float64 [n].
            score: take the score of the number, -d log(density) / dz, in its place.

        Returns:
            [n, *shape] of the dtype of `factor`.
        """

    @property
    def energy(self) -> float:
        """Mean square of the score of an entry."""
        return 1.0

    def overlap(self, count: Tensor) -> Tensor:
        """How much directions of a row repeat each other, float64 like `count`.

        So many directions leave an estimate a variance of overlap / count, in units of that of
        one: 1 where they are independent, 0 where they tell all there is.

        Args:
            count: directions of each row.
        """
        return torch.ones_like(count)

    def size(self, name: str) -> float:
        """Size of the noise at a layer, relative to the rest."""
        return (self.scales or {}).get(name, 1.0)

    def dense(self, name: str, ids: Tensor) -> Tensor:
        """[len(ids), *shape]: what a query at scale 1 has added; zeros where there is no noise."""
        size = torch.tensor(self.size(name), dtype=self.dtype(name), device=ids.device)
        return self.times(name, ids, size.expand(len(ids)))

    def add(self, out: Tensor, name: str, ids: Tensor, scale: Tensor) -> None:
        """Adds `scale[j]` times number `ids[j]` to `out[j]`, in place.

        Args:
            out: [n, *shape], any strides.
            scale: float64 [n].
        """
        factor = (scale * self.size(name)).to(self.dtype(name))
        for part in _chunks(len(ids), self.shape(name), ids.device):
            out[part].add_(self.times(name, ids[part], factor[part]))

    def _check(self) -> None:
        for name, size in (self.scales or {}).items():
            if not 0 < size < math.inf:
                raise ValueError(
                    f"{type(self).__name__}(scales=...) must be positive, got {size!r} for "
                    f"{name!r}."
                )


@dataclass(frozen=True)
class SiteNoise(Noise):
    """Noise that is drawn when it is needed.

    A number depends on the key, the name of the layer and its own number, and on nothing else.

    Args:
        key: names the noise.
        sites: name -> `Output`, from the oracle.
        count: how many numbers a layer has.
        law: "rademacher" (one bit an entry), "gaussian" or "laplace".
        scales: name -> size of the noise there; 1 where a name is missing.
        only: the layers that get noise; None for all.

    Raises:
        ValueError: the law is unknown, or a scale is not positive.
        UsageError: `only` names what is no layer.

    Example:
        >>> sites = {"head": Output((3,), torch.float32, ("head.weight",))}
        >>> SiteNoise(Key.root(0), sites, count=4).dense("head", torch.tensor([2, 2])).shape
        torch.Size([2, 3])
    """

    key: Key
    sites: Mapping[str, Output]
    count: int
    law: str = "rademacher"
    scales: Mapping[str, float] | None = None
    only: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(
                f"SiteNoise(law=...) must be one of {', '.join(LAWS)}, got {self.law!r}."
            )
        self._check()
        for name in self.only or ():
            if name not in self.sites:
                raise UsageError(
                    f"SiteNoise(only=...) names {name!r}, which is no layer; the first are "
                    f"{', '.join(list(self.sites)[:3])}."
                )

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(n for n in self.sites if self.only is None or n in self.only)

    @property
    def energy(self) -> float:
        return 2.0 if self.law == Laplace.name else 1.0

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.sites[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return _wide(self.sites[name].dtype)

    def times(self, name: str, ids: Tensor, factor: Tensor, score: bool = False) -> Tensor:
        shape, law = self.shape(name), LAWS[self.law]
        if name not in self.names:
            return factor.new_zeros(len(ids), *shape)
        raw = self._raw(name, ids)
        if self.law == "rademacher" and factor.dtype == torch.float32:
            out = signs(raw, factor)
        else:
            out = law.expand(raw, factor.dtype)
            if score and self.law == Laplace.name:
                out = out.sign().mul_(math.sqrt(2))
            out = out * factor.unsqueeze(1)
        return out[:, : math.prod(shape)].reshape(len(ids), *shape)

    @cached_property
    def _blocks(self) -> Mapping[str, slice]:
        """Where the random words of each layer lie, in blocks of four."""
        per_block, places, start = LAWS[self.law].numbers_per_block, {}, 0
        for name in self.names:
            stop = start - (-math.prod(self.shape(name)) // per_block)
            places[name] = slice(start, stop)
            start = stop
        return places

    def _raw(self, name: str, ids: Tensor) -> Tensor:
        """int32 or float32 [len(ids), blocks, 4]: the law's compact form."""
        place, blocks = self._blocks[name], max(p.stop for p in self._blocks.values())
        if 16 * blocks * self.count > _KEEP_BYTES:
            return self._drawn(ids, place)
        return self._kept(ids.device, blocks)[:, place][ids]

    def _kept(self, device: torch.device, blocks: int) -> Tensor:
        kept: Tensor | None = self.__dict__.get("_words")
        if kept is None or kept.device != device:
            ids = torch.arange(self.count, device=device)
            kept = self.__dict__["_words"] = self._drawn(ids, slice(0, blocks))
        return kept

    def _drawn(self, ids: Tensor, place: slice) -> Tensor:
        sizes = tuple((name, p.stop - p.start) for name, p in self._blocks.items())
        # What is kept outlives inference mode.
        with torch.inference_mode(False):
            block, low, high = (part[place] for part in _counters(sizes, ids.device))
            step = max(1, _WORDS // (4 * max(1, len(block))))
            parts = [
                LAWS[self.law].raw(self.key.words(block, part.unsqueeze(1), (low, high)))
                for part in ids.split(step)
            ]
            return torch.cat(parts)


@dataclass(frozen=True)
class GivenNoise(Noise):
    """Numbers that someone else has made, such as quasi-random normal points.

    Args:
        values: name -> [count, *shape of a row]; their score is taken to be the number itself,
            as it is for normal and Rademacher numbers.
        scales: name -> size of the noise there; 1 where a name is missing.
    """

    values: Mapping[str, Tensor]
    scales: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        self._check()
        if len({len(value) for value in self.values.values()}) > 1:
            raise ValueError("GivenNoise(values=...) must have as many numbers for every layer.")

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(next(iter(self.values.values()), ()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.values)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        return _wide(self.values[name].dtype)

    def times(self, name: str, ids: Tensor, factor: Tensor, score: bool = False) -> Tensor:
        shape = (-1, *[1] * len(self.shape(name)))
        return self.values[name][ids].to(factor.dtype) * factor.view(shape)


class NoiseSum(Mapping[str, Tensor]):
    """The sum of coefficient times score over the queries of each row, formed when it is asked for.

    With slopes (differences of losses over the scale) as coefficients it estimates the derivative
    of the losses by the outputs: a layer of size s counts 1 / s.

    Args:
        noise: what the queries had.
        row: int64 [queries].
        index: int64 [queries], numbers within the noise.
        coefficients: [queries].
        rows: of the batch.
    """

    def __init__(
        self, noise: Noise, row: Tensor, index: Tensor, coefficients: Tensor, rows: int
    ) -> None:
        self.noise, self.row, self.index, self.rows = noise, row, index, rows
        self.coefficients = coefficients
        self._rounds: dict[tuple[int, int], list[Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, 0, self.rows)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, *shape], float64 where the layer's output is and float32 elsewhere."""
        if name not in self.noise.names:
            raise KeyError(name)
        shape, noise = self.noise.shape(name), self.noise
        factor = (self.coefficients / noise.size(name)).to(noise.dtype(name))
        total = factor.new_zeros(stop - start, *shape)
        for queries in self._within(start, stop):
            for part in _chunks(len(queries), shape, queries.device):
                some = queries[part]
                numbers = noise.times(name, self.index[some], factor[some], score=True)
                total.index_add_(0, self.row[some] - start, numbers)
        return total

    def _within(self, start: int, stop: int) -> list[Tensor]:
        """Queries of some rows in rounds, each with at most one query of a row.

        No row comes twice in one sum, so its terms are added in one order on every device.
        """
        if (start, stop) not in self._rounds:
            mine = torch.nonzero((self.row >= start) & (self.row < stop)).flatten()
            mine = mine[torch.argsort(self.row[mine], stable=True)]
            if mine.device.type == "cpu":
                # There one sum adds in the order of its terms anyway, which is the same.
                self._rounds[start, stop] = [mine]
                return self._rounds[start, stop]
            row = self.row[mine]
            count = torch.bincount(row - start, minlength=stop - start)
            place = torch.arange(len(mine), device=row.device)
            place = place - (count.cumsum(0) - count)[row - start]
            order = torch.argsort(place, stable=True)
            sizes = torch.bincount(place).tolist()
            self._rounds[start, stop] = list(mine[order].split(sizes))
        return self._rounds[start, stop]

    def __contains__(self, name: object) -> bool:
        return name in self.noise.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.noise.names)

    def __len__(self) -> int:
        return len(self.noise.names)


def signs(words: Tensor, factor: Tensor) -> Tensor:
    """float32 [n, 128 * blocks]: factor[j] times the signs that the bits of words[j] stand for."""
    n = len(words)
    words = words.reshape(n, -1, 1)
    shifts = torch.arange(31, -1, -1, dtype=torch.int32, device=words.device)
    out = words << shifts
    # The bit is the sign now; a set bit is +1, so the rest is that of minus the factor.
    out &= -(2**31)
    out ^= (-factor).view(torch.int32).view(n, 1, 1)
    return out.view(torch.float32).flatten(1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(count: int, shape: tuple[int, ...], device: torch.device) -> Iterator[slice]:
    step = max(1, _NUMBERS.get(device.type, 2**24) // max(_BLOCK, math.prod(shape)))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@lru_cache(maxsize=16)
def _counters(sizes: tuple[tuple[str, int], ...], device: torch.device) -> tuple[Tensor, ...]:
    block, low, high = [], [], []
    for name, blocks in sizes:
        words = stream_id(f"output of {name}")
        block.append(torch.arange(blocks))
        low.append(torch.full((blocks,), words[0]))
        high.append(torch.full((blocks,), words[1]))
    return tuple(torch.cat(part).to(device) for part in (block, low, high))
