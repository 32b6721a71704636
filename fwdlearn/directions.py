"""Random directions: tangents of the parameters, named by a key and a number, drawn at will.

A direction is never stored whole. A matrix gets a low-rank product of two thin factors, a vector
its own entries, and `rank=None` gives every tensor independent entries. Whatever the kind, the
covariance of a direction is the identity, so that the mean of `(g . E) E` is `g`.
"""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
# The same on a GPU, where every operation that is started costs as much as a sweep over these.
_EXPAND_BYTES_GPU = 512 * 2**20
# Numbers made at once that are then rounded to a short dtype: blocks of more than a few megabytes
# come and go, and leave holes in the memory of the process that nothing else fits into.
_PIECE = 2**20
# What three passes over the same numbers find again in a cache.
_CACHE_BYTES = 2**20
# Numbers of a block that are expanded at once, and how many such pages are kept: all of them would
# be as large as an activation.
_PAGE_BYTES, _PAGES = 2 * 2**20, 2
# A parameter with more numbers a direction is expanded alone, and only where it is asked for.
_LONG = 2**14


class Law(ABC):
    """How random words become numbers of mean 0 and variance 1.

    `raw` is the compact form that is kept, `expand` makes floating-point numbers of it.
    """

    name: ClassVar[str]
    numbers_per_block: ClassVar[int]
    raw_bytes_per_block: ClassVar[int]
    # Whether bfloat16 holds every number exactly.
    short: ClassVar[bool] = False

    @abstractmethod
    def raw(self, words: Tensor) -> Tensor:
        """int64 [..., 4] -> the kept form [..., 4], four bytes each."""

    @abstractmethod
    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The kept form [count, blocks, 4] -> [count, blocks * numbers_per_block] of `dtype`."""

    @abstractmethod
    def pick(self, raw: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers at int64 `index` [count, k] of what `expand` would give: [count, k]."""


class Rademacher(Law):
    """+1 or -1 with equal probability: one bit a number, the same on every machine."""

    name = "rademacher"
    numbers_per_block = 128
    raw_bytes_per_block = 16
    short = True

    def raw(self, words: Tensor) -> Tensor:
        return words.to(torch.int32)

    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        count, words = len(raw), raw.flatten(1)
        # The bit moves to the sign of a one that is written as an integer of the same width.
        short = dtype in _SHORT_ONES
        size, ones = (torch.int16, _SHORT_ONES[dtype]) if short else (torch.int32, 0x3F800000)
        words = words.contiguous().view(size)
        width = 8 * size.itemsize
        shifts = torch.arange(width - 1, -1, -1, dtype=size, device=raw.device)
        sign = -(1 << (width - 1))
        out = torch.empty(count, words.shape[1], width, dtype=size, device=raw.device)
        cache = _CACHE_BYTES if raw.device.type == "cpu" else _EXPAND_BYTES_GPU
        step = max(1, cache // max(1, out[:1].numel() * size.itemsize))
        for start in range(0, count, step):
            part = out[start : start + step]
            torch.bitwise_left_shift(words[start : start + step, :, None], shifts, out=part)
            # A set bit is +1.
            part.bitwise_and_(sign).bitwise_xor_(sign | ones)
        return out.view(dtype if short else torch.float32).flatten(1).to(dtype)

    def pick(self, raw: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        words = raw.flatten(1).gather(1, index >> 5)
        return (((words >> (index & 31)) & 1) * 2 - 1).to(dtype)


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
        return pair.flatten(-2).float()

    def expand(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        return raw.flatten(1).to(dtype)

    def pick(self, raw: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        return raw.flatten(1).gather(1, index).to(dtype)


LAWS: Mapping[str, Law] = {law.name: law for law in (Rademacher(), Gaussian())}

# 1.0 as the integer that a short dtype stores.
_SHORT_ONES = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}


@dataclass(frozen=True)
class Site:
    """Where the numbers of one parameter lie in its family, and what they form.

    Args:
        name: the parameter's name, which also names its random stream.
        shape: the parameter's shape.
        dtype: of the factors; the parameter's own, so that what is measured is what is applied.
        rank: of the product; 0 for independent entries.
        scale: size of the direction here, relative to the rest.
        numbers: how many a direction takes.
        start: first block of the family that belongs to this parameter.
        blocks: how many there are.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    rank: int
    scale: float
    numbers: int
    start: int
    blocks: int

    @property
    def matrix(self) -> tuple[int, int]:
        """The parameter as (m, n): leading ones dropped, trailing dimensions flattened."""
        return as_matrix(self.shape)

    @property
    def long(self) -> bool:
        """Whether it is left out of the buffer that holds the numbers of all parameters."""
        return self.numbers > _LONG

    def form(self, numbers: Tensor) -> LowRank | Tensor:
        """What perturbs the parameter, from its numbers [count, at least `self.numbers`]."""
        m, n = self.matrix
        if not self.rank:
            dense = numbers[:, : m * n].reshape(-1, *self.shape)
            return dense if self.scale == 1 else dense * self.scale
        left, right = numbers[:, : self.numbers].split((self.rank * m, self.rank * n), 1)
        shape = (len(numbers), -1, self.rank)
        return LowRank(left.reshape(shape), right.reshape(shape), self.rank**-0.5 * self.scale)


def as_matrix(shape: torch.Size) -> tuple[int, int]:
    """(m, n) of a parameter: leading ones dropped, trailing dimensions flattened."""
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


class ReadParams(dict[str, Tensor]):
    """Name -> tensor, and the entries of tables that the rows of a batch read.

    A table is a matrix that a model looks entries up in and uses in no other way: what is not
    looked up has no gradient, exactly.

    Args:
        params: name -> tensor.
        read: name of a table -> int64 [k], ascending; asked once, when it is needed.
    """

    def __init__(
        self, params: Mapping[str, Tensor], read: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        super().__init__(params)
        self._read = read

    @cached_property
    def entries(self) -> Mapping[str, Tensor]:
        """Name of a table -> the entries that are read."""
        return {name: value for name, value in self._read().items() if name in self}


@dataclass(frozen=True)
class Directions:
    """A family of `count` random directions of `params`.

    Args:
        key: names the family. The same key gives the same directions on any machine.
        params: name -> tensor; only shapes, dtypes and devices are read. Parameters of a model
            that it lacks stay as they are in `losses()`. Where they are `ReadParams`, directions
            are zero in entries of tables that nothing reads.
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
        sizes = self.scales or {}
        shapes = (
            (name, value.shape, value.dtype, sizes.get(name, 1.0))
            for name, value in self.params.items()
        )
        return _sites(tuple(shapes), self.law, self.rank)

    @property
    def entries(self) -> Mapping[str, Tensor]:
        """Name of a table -> int64 [k], outside of which directions are zero."""
        known: Mapping[str, Tensor] = getattr(self.params, "entries", {})
        return known

    @cached_property
    def bytes_per_direction(self) -> int:
        """Bytes that one direction takes while it is kept."""
        return LAWS[self.law].raw_bytes_per_block * self._blocks()

    @property
    def signs(self) -> bool:
        """Whether all numbers of the factors are 1 and -1, times a size."""
        return self.law == Rademacher.name

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @property
    def _expand_bytes(self) -> int:
        return _EXPAND_BYTES if self.device.type == "cpu" else _EXPAND_BYTES_GPU

    @property
    def piece(self) -> int:
        """Numbers of a gradient that are made at once in float32 before they are rounded."""
        return _PIECE if self.device.type == "cpu" else _EXPAND_BYTES_GPU // 4

    def at(self, ids: Tensor | slice, together: bool = True) -> Factors:
        """Some of the directions, to be asked for all parameters `together` or for a few.

        For passes: in entries that these do not read, there may be numbers all the same.
        """
        return Factors(self, ids, together)

    def factors(self, name: str, ids: Tensor | slice) -> LowRank | Tensor:
        """What perturbs one parameter: `LowRank`, or [len(ids), *shape] where it is dense."""
        found = self.at(ids, together=False)[name]
        if name not in self.entries:
            return found
        site = self.sites[name]
        kept = torch.zeros(site.shape[0], 1, dtype=site.dtype, device=self.device)
        kept[self.entries[name]] = 1
        return found * kept if isinstance(found, Tensor) else replace(found, left=found.left * kept)

    def read(self, name: str, ids: Tensor | slice) -> LowRank | Tensor:
        """Of a table, the entries that are read alone: left [count, k, rank], or [count, k, n]."""
        entries, some = self.entries[name], self.at(ids, together=False)
        if not self.sites[name].rank:
            dense = some[name]
            assert isinstance(dense, Tensor)
            return dense[:, entries]
        count = len(range(self.count)[ids]) if isinstance(ids, slice) else len(ids)
        return some.picked(name, entries.expand(count, -1))

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
                numbers = math.prod(site.shape)
                if name in self.entries:
                    numbers = len(self.entries[name]) * site.shape[1]
                total += numbers * site.scale**2
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
        size = max(1, self._expand_bytes // (4 * self.sites[name].numbers))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def raw(self, ids: Tensor | slice, start: int, stop: int) -> Tensor:
        """The kept form of some blocks, [len(ids), stop - start, 4]."""
        if self.bytes_per_direction * self.count <= _KEEP_BYTES:
            return self._kept[:, start:stop][ids]
        if isinstance(ids, slice):
            ids = torch.arange(self.count, device=self.device)[ids]
        return self._generate(ids, start, stop)

    @cached_property
    def expanded(self) -> Tensor | None:
        """Every number of every direction, where that is little and of one dtype."""
        dtypes = {site.dtype for site in self.sites.values()}
        blocks = self._blocks(long=False)
        numbers = LAWS[self.law].numbers_per_block * blocks * self.count
        if len(dtypes) > 1 or 4 * numbers > self._expand_bytes:
            return None
        with torch.inference_mode(False):
            return LAWS[self.law].expand(self.raw(slice(None), 0, blocks), dtypes.pop())

    def _blocks(self, long: bool = True) -> int:
        """Blocks of a direction, with or without those of long parameters, which come last."""
        ends = [site.start + site.blocks for site in self.sites.values() if long or not site.long]
        return max(ends, default=0)

    @cached_property
    def _kept(self) -> Tensor:
        ids = torch.arange(self.count, device=self.device)
        return self._generate(ids, 0, self._blocks())

    def _generate(self, ids: Tensor, start: int, stop: int) -> Tensor:
        law = LAWS[self.law]
        streams = tuple((site.name, site.blocks) for site in _in_order(self.sites))
        # The buffers outlive inference mode: an optimizer may work on them in place.
        with torch.inference_mode(False):
            block, low, high = (part[start:stop] for part in _counters(streams, self.device))
            size = max(1, self._expand_bytes // (64 * max(1, stop - start)))
            parts = []
            for chunk in ids.split(size):
                words = self.key.words(block, chunk.unsqueeze(1), (low, high))
                parts.append(law.raw(words))
            return torch.cat(parts) if len(parts) != 1 else parts[0]


class Factors:
    """Some directions of a family, parameter by parameter.

    Args:
        family: the family.
        ids: int64 [count], or a slice.
        together: whether to expand the numbers of all short parameters at once, into one buffer.
    """

    def __init__(self, family: Directions, ids: Tensor | slice, together: bool = True) -> None:
        self.family, self.ids, self.together = family, ids, together
        self._pages: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._raws: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> LowRank | Tensor:
        """`LowRank`, or [count, *shape] where the directions are dense."""
        site = self.family.sites[name]
        law = LAWS[self.family.law]
        if site.long or not (self.together or self.family.expanded is not None):
            raw = self._raw(site)
            with torch.inference_mode(False):
                return site.form(law.expand(raw, site.dtype))
        first, numbers = (0, self._buffer(site.dtype)) if self.page is None else self._page(site)
        start = (site.start - first) * law.numbers_per_block
        return site.form(numbers[:, start : start + site.numbers])

    @cached_property
    def page(self) -> int | None:
        """Blocks of a page; None where few numbers need none, or a GPU has the room for all."""
        family, ids = self.family, self.ids
        if family.device.type != "cpu" or family.expanded is not None:
            return None
        count = len(range(family.count)[ids]) if isinstance(ids, slice) else len(ids)
        size = 4 * LAWS[family.law].numbers_per_block * max(1, count)
        if size * family._blocks(long=False) <= _PAGES * _PAGE_BYTES:
            return None
        return max(1, _PAGE_BYTES // size)

    def picked(self, name: str, entries: Tensor) -> LowRank:
        """The factors of a matrix with the left one at some of its rows alone.

        Args:
            entries: int64 [count, k], rows of the matrix.

        Returns:
            left [count, k, rank], right [count, n, rank].
        """
        site, law = self.family.sites[name], LAWS[self.family.law]
        if not site.long:
            whole = self[name]
            assert isinstance(whole, LowRank)
            number = torch.arange(len(entries), device=entries.device)[:, None]
            return LowRank(whole.left[number, entries], whole.right, whole.scale)
        raw = self._raw(site)
        place = torch.arange(site.rank, device=entries.device)
        index = (entries.unsqueeze(-1) * site.rank + place).flatten(1)
        left = law.pick(raw, index, site.dtype).view(*entries.shape, site.rank)
        m, n = site.matrix
        index = torch.arange(site.rank * m, site.numbers, device=entries.device)
        right = law.pick(raw, index.expand(len(raw), -1), site.dtype).view(len(raw), n, site.rank)
        return LowRank(left, right, site.rank**-0.5 * site.scale)

    def numbers(self) -> tuple[dict[torch.dtype, Tensor], dict[str, Tensor]]:
        """All that depends on the key: numbers by dtype, and the kept form of long parameters."""
        sites = self.family.sites.values()
        for dtype in {site.dtype for site in sites if not site.long}:
            self._buffer(dtype)
        return self._buffers, {site.name: self._raw(site) for site in sites if site.long}

    def given(self, buffers: Mapping[torch.dtype, Tensor], raws: Mapping[str, Tensor]) -> Factors:
        """The same with numbers from elsewhere, in the form that `numbers` gives."""
        other = Factors(self.family, self.ids)
        other.page, other._buffers, other._raws = None, dict(buffers), dict(raws)
        return other

    def _raw(self, site: Site) -> Tensor:
        if site.name in self._raws:
            return self._raws[site.name]
        return self.family.raw(self.ids, site.start, site.start + site.blocks)

    def _page(self, site: Site) -> tuple[int, Tensor]:
        """The numbers of a parameter and its neighbours, and the block that they begin with."""
        assert self.page is not None
        key = site.start // self.page, site.dtype
        if key not in self._pages:
            if len(self._pages) == _PAGES:
                del self._pages[next(iter(self._pages))]
            near = [
                other
                for other in self.family.sites.values()
                if not other.long and other.start // self.page == key[0]
            ]
            start = min(other.start for other in near)
            stop = max(other.start + other.blocks for other in near)
            with torch.inference_mode(False):
                raw = self.family.raw(self.ids, start, stop)
                self._pages[key] = start, LAWS[self.family.law].expand(raw, site.dtype)
        return self._pages[key]

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._buffers:
            whole = self.family.expanded
            if whole is not None:
                self._buffers[dtype] = whole[self.ids]
            else:
                law, blocks = LAWS[self.family.law], self.family._blocks(long=False)
                with torch.inference_mode(False):
                    raw = self.family.raw(self.ids, 0, blocks)
                    self._buffers[dtype] = law.expand(raw, dtype)
        return self._buffers[dtype]


@lru_cache(maxsize=64)
def _sites(
    shapes: tuple[tuple[str, torch.Size, torch.dtype, float], ...], law: str, rank: int | None
) -> Mapping[str, Site]:
    per_block = LAWS[law].numbers_per_block
    sites = []
    for name, shape, dtype, scale in shapes:
        m, n = as_matrix(shape)
        # A product with a side of length one is no shorter than the entries themselves.
        own = 0 if rank is None or min(m, n) == 1 else rank
        numbers = own * (m + n) if own else m * n
        sites.append(Site(name, shape, dtype, own, scale, numbers, 0, -(-numbers // per_block)))
    start, placed = 0, {}
    for site in sorted(sites, key=lambda site: site.long):
        placed[site.name] = replace(site, start=start)
        start += site.blocks
    return {site.name: placed[site.name] for site in sites}


def independent(params: Mapping[str, Tensor]) -> Mapping[str, Site]:
    """The sites of directions that are dense in every parameter."""
    shapes = tuple((name, value.shape, value.dtype, 1.0) for name, value in params.items())
    return _sites(shapes, Rademacher.name, None)


def _in_order(sites: Mapping[str, Site]) -> list[Site]:
    return sorted(sites.values(), key=lambda site: site.start)


@lru_cache(maxsize=16)
def _counters(
    streams: tuple[tuple[str, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For every block of a direction: its number within its stream, and the stream's two words."""
    block = torch.cat([torch.arange(blocks) for _, blocks in streams])
    words = torch.tensor([stream_id(name) for name, _ in streams])
    words = words.repeat_interleave(torch.tensor([blocks for _, blocks in streams]), 0)
    return block.to(device), words[:, 0].to(device), words[:, 1].to(device)


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
