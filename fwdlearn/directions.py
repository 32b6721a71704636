"""Random directions: tangents of the parameters, named by a key and a number, drawn at will.

A direction is never stored whole. A matrix gets a low-rank product of two thin factors, a vector
its own entries, and `rank=None` gives every tensor independent entries. Whatever the kind, the
covariance of a direction is the identity, so that the mean of `(g . E) E` is `g`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.factors import Factors, LowRank, Site, sites_of
from fwdlearn.keys import Key, stream_id
from fwdlearn.laws import EXPAND_BYTES_GPU, LAWS, Rademacher, check_law

# Numbers of a family that are kept between the forward passes and the update, in bytes.
_KEEP_BYTES = 256 * 2**20
# Numbers expanded at once, so that building a gradient needs little beside the gradient.
_EXPAND_BYTES = 16 * 2**20
# Numbers made at once that are then rounded to a short dtype: blocks of more than a few megabytes
# come and go, and leave holes in the memory of the process that nothing else fits into.
_PIECE = 2**20


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
        return sites_of(tuple(shapes), self.law, self.rank)

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
        return _EXPAND_BYTES if self.device.type == "cpu" else EXPAND_BYTES_GPU

    @property
    def piece(self) -> int:
        """Numbers of a gradient that are made at once in float32 before they are rounded."""
        return _PIECE if self.device.type == "cpu" else EXPAND_BYTES_GPU // 4

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


def independent(params: Mapping[str, Tensor]) -> Mapping[str, Site]:
    """The sites of directions that are dense in every parameter."""
    shapes = tuple((name, value.shape, value.dtype, 1.0) for name, value in params.items())
    return sites_of(shapes, Rademacher.name, None)


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
