"""Where the numbers of a parameter lie within a direction, and the factors that they form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fwdlearn.laws import LAWS

if TYPE_CHECKING:
    from fwdlearn.directions import Directions

# Numbers of a block that are expanded at once, and how many such pages are kept: all of them would
# be as large as an activation.
_PAGE_BYTES, _PAGES = 2 * 2**20, 2
# A parameter with more numbers a direction is expanded alone, and only where it is asked for.
_LONG = 2**14


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


@lru_cache(maxsize=64)
def sites_of(
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
