"""What an estimate carries: a gradient that is built one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fwdlearn.directions import Directions
from fwdlearn.errors import UsageError
from fwdlearn.factors import LowRank, Site
from fwdlearn.laws import LAWS


def used_in(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of the coefficients of directions in tensors of `dtypes`."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class DirectionGradient(Mapping[str, Tensor]):
    """The sum of coefficient times direction, formed when a name is asked for.

    A direction of size s in a parameter counts 1 / s^2 there: the coefficients are slopes along
    the whole direction, and the result is a gradient whatever the sizes.

    A low-rank family costs one matrix product per tensor, with inner dimension
    directions x rank. Sums run in float32 (float64 for float64 parameters). With signs
    (Rademacher) they are exact, because the coefficients are taken to a grid that leaves room for
    their sum: every machine, and every order of adding, gives the same bits. That rounds a
    coefficient by at most the sum of their sizes x rank / 2^24 (2^53).

    Args:
        directions: the family.
        coefficients: [directions.count], one scalar a direction.
    """

    def __init__(self, directions: Directions, coefficients: Tensor) -> None:
        if coefficients.shape != (directions.count,):
            raise ValueError(
                f"DirectionGradient needs one coefficient for each of {directions.count} "
                f"directions, got shape {tuple(coefficients.shape)}."
            )
        self.directions = directions
        self.coefficients = coefficients

    def __getitem__(self, name: str) -> Tensor:
        family = self.directions
        site = family.sites[name]
        if name in family.entries:
            entries, values = self.read(name)
            whole = values.new_zeros(site.shape)
            return whole.index_copy_(0, entries, values)
        if self._weighted is not None and site.rank <= 1 and not site.long:
            return self._at_once(site, *self._weighted)
        dtype = torch.float64 if site.dtype == torch.float64 else torch.float32
        total = self._summed(site, dtype, site.shape, lambda ids: family.factors(name, ids))
        return total.view(site.shape)

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Of a table: the entries that are read, int64 [k], and the gradient there, [k, n].

        It is zero everywhere else.
        """
        family = self.directions
        site, entries = family.sites[name], family.entries[name]
        dtype = torch.float64 if site.dtype == torch.float64 else torch.float32
        shape = torch.Size((len(entries), site.shape[1]))
        return entries, self._summed(site, dtype, shape, lambda chunk: family.read(name, chunk))

    def _summed(
        self,
        site: Site,
        dtype: torch.dtype,
        shape: torch.Size,
        ask: Callable[[slice], LowRank | Tensor],
    ) -> Tensor:
        """The sum over directions of what `ask` has of some of them, as [m, n] or `shape`."""
        family, total = self.directions, None
        coefficients = self._wide[dtype]
        for chunk in family.chunks(site.name, family.count):
            factors = ask(chunk)
            if isinstance(factors, Tensor):
                flat = factors.to(dtype).reshape(len(factors), -1)
                if site.scale != 1:
                    flat = flat.sign_() if self._signs else flat.div_(site.scale)
                part = (coefficients[chunk] @ flat).view(shape)
                total = part if total is None else total.add_(part)
                continue
            # [m, directions * rank] and [directions * rank, n]; views where the rank is one.
            left = factors.left.to(dtype) * coefficients[chunk, None, None]
            left = left.transpose(1, 2).flatten(0, 1).T
            right = factors.right.transpose(1, 2).flatten(0, 1)
            if total is None:
                total = self._product(left, right)
            else:
                # In place, so that one dense gradient is alive and no second one beside it.
                total.addmm_(left, right.to(dtype))
        if total is None:
            return torch.zeros(shape, dtype=dtype, device=family.device)
        size = self._size(site)
        return total if size == 1 else total.mul_(size)

    def rounded(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same in a short dtype, and its squared norm before it is rounded.

        Made some rows of a matrix at a time: beside the result there is little of it in float32.
        """
        family = self.directions
        site = family.sites[name]
        (m, n), chunks = site.matrix, list(family.chunks(name, family.count))
        coefficients, size = self._wide[torch.float32], self._size(site)
        out = torch.empty(m, n, dtype=dtype, device=family.device)
        square = torch.zeros((), device=family.device)
        kept: list[LowRank] = []
        for rows in out.split(max(1, family.piece // n)):
            total = torch.zeros(rows.shape, device=family.device)
            first = rows.storage_offset() // n
            for chunk in chunks:
                factors = kept[0] if kept else family.factors(name, chunk)
                assert isinstance(factors, LowRank)
                if len(chunks) == 1:
                    kept = [factors]
                left = factors.left[:, first : first + len(rows)].float()
                left = left * coefficients[chunk, None, None]
                left = left.transpose(1, 2).flatten(0, 1).T
                total += self._product(left, factors.right.transpose(1, 2).flatten(0, 1))
            rows.copy_(total.mul_(size))
            square += squared(total)
        return out.view(site.shape), square

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """[m, k] in the dtype of the sum times [k, n] numbers of the law."""
        if left.dtype == torch.float64 or not self._signs or not left.is_cuda:
            return left @ right.to(left.dtype)
        # A GPU multiplies bfloat16 ten times faster, and nothing is rounded.
        return torch.mm(thirds(left), right.to(torch.bfloat16).repeat(3, 1), out_dtype=left.dtype)

    @cached_property
    def _wide(self) -> Mapping[torch.dtype, Tensor]:
        """The coefficients, in the dtypes that sums run in."""
        wide = {
            torch.float64 if site.dtype is torch.float64 else torch.float32
            for site in self.directions.sites.values()
        }
        values = {dtype: self.used.to(dtype) for dtype in wide}
        if not self._signs:
            return values
        terms = self.directions.rank or 1
        return {dtype: summable(value, terms) for dtype, value in values.items()}

    @cached_property
    def used(self) -> Tensor:
        """[directions]: the coefficients in the widest dtype that a sum runs in."""
        dtype = used_in(site.dtype for site in self.directions.sites.values())
        return self.coefficients.to(self.directions.device, dtype)

    @property
    def _signs(self) -> bool:
        """Whether the numbers of directions are 1 and -1."""
        return self.directions.signs

    @cached_property
    def _weighted(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """All numbers, the same times the coefficients, and the sum of those over directions."""
        numbers = self.directions.expanded
        if numbers is None or numbers.dtype not in (torch.float32, torch.float64):
            return None
        weighted = numbers * self._wide[numbers.dtype][:, None]
        return numbers, weighted, weighted.sum(0)

    def _at_once(self, site: Site, numbers: Tensor, weighted: Tensor, sums: Tensor) -> Tensor:
        start = site.start * LAWS[self.directions.law].numbers_per_block
        if site.rank:
            m, n = site.matrix
            middle, stop = start + m, start + m + n
            total = self._product(weighted[:, start:middle].T, numbers[:, middle:stop])
        else:
            total = sums[start : start + site.numbers]
        size = self._size(site)
        return (total if size == 1 else total * size).view(site.shape)

    def _size(self, site: Site) -> float:
        """What the sum of coefficients times numbers, which have variance 1, is to be taken by."""
        if site.rank:
            return site.rank**-0.5 / site.scale
        # A dense direction has the size that the parameter's dtype makes of it.
        return float(torch.tensor(site.scale, dtype=site.dtype)) / site.scale**2

    @property
    def spread(self) -> float:
        """Standard deviation over the directions of count times coefficient.

        With directions that all rows share, that of the slopes of the batch's loss.

        Raises:
            UsageError: there is one direction alone.
        """
        count = len(self.coefficients)
        if count < 2:
            raise UsageError(
                "the spread of one direction's slope is not known; raise allocator.directions."
            )
        return float(self.coefficients.double().std()) * count

    def square_norms(self) -> Tensor:
        """float64 [directions]: |direction|^2 as it enters the gradient."""
        family = self.directions
        ids = torch.arange(family.count, device=family.device)
        inverse = {name: 1 / site.scale for name, site in family.sites.items()}
        return replace(family, scales=inverse).square_norms(ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.directions.sites)

    def __len__(self) -> int:
        return len(self.directions.sites)


def summable(value: Tensor, times: int = 1) -> Tensor:
    """Numbers rounded to a grid on which they, with any signs, add up without rounding.

    Args:
        value: float32 or float64 [count], fewer than 2^22.
        times: how often each of them enters the sum.
    """
    bits = 24 if value.dtype == torch.float32 else 53
    most = float(value.abs().sum(dtype=torch.float64)) * times * (1 + len(value) * 2.0**-23)
    if not 2.0**-900 < most < 2.0**900:
        # Nothing to add up, or nothing that could be.
        return value
    grid = 2.0 ** (math.frexp(most)[1] - bits)
    return (value.double() / grid).round_().mul_(grid).to(value.dtype)


def thirds(value: Tensor) -> Tensor:
    """bfloat16 [m, 3 n] of float32 [m, n]: three parts of eight bits, whose sum is the value."""
    parts = []
    for _ in range(3):
        parts.append(value.to(torch.bfloat16))
        value = value - parts[-1].float()
    return torch.cat(parts, 1)


def update_of(gradient: Mapping[str, Tensor], name: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """What an optimizer is handed for a parameter, in its dtype, and the squared norm of that.

    Where the dtype is short and the parameter large, the gradient is not formed in float32 first.
    """
    short = value.dtype.itemsize < 4
    if short and isinstance(gradient, DirectionGradient):
        family = gradient.directions
        if name in family.entries:
            entries, grad = gradient.read(name)
            whole = torch.zeros_like(value)
            return whole.index_copy_(0, entries, grad.to(value.dtype)), squared(grad)
        if family.sites[name].rank and value.numel() > family.piece:
            return gradient.rounded(name, value.dtype)
    grad = gradient[name]
    return grad.to(value.dtype), squared(grad)


def squared(value: Tensor) -> Tensor:
    """The squared norm."""
    return torch.dot(value.flatten(), value.flatten())


class Summed(Mapping[str, Tensor]):
    """The sum of gradients, formed when a name is asked for.

    Args:
        parts: gradients of the same parameters, one at least.
    """

    def __init__(self, *parts: Mapping[str, Tensor]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Tensor:
        total = self.parts[0][name]
        for part in self.parts[1:]:
            total = total + part[name]
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts[0])

    def __len__(self) -> int:
        return len(self.parts[0])


class ScaledGradient(Mapping[str, Tensor]):
    """Another gradient, each tensor times a number, formed when a name is asked for.

    Args:
        gradient: the other.
        factors: name -> number, for every name.
    """

    def __init__(self, gradient: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
        self.gradient, self.factors = gradient, factors

    def __getitem__(self, name: str) -> Tensor:
        return self.gradient[name] * self.factors[name]

    @property
    def spread(self) -> float:
        """Of the other gradient's slopes, times the largest number."""
        return spread_of(self.gradient) * max(self.factors.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self.gradient)

    def __len__(self) -> int:
        return len(self.gradient)


def spread_of(gradient: Mapping[str, Tensor]) -> float:
    """The spread of the slopes that a gradient is made of.

    Raises:
        UsageError: it is no sum of random directions, or of one alone.
    """
    found = getattr(gradient, "spread", None)
    if found is None:
        raise UsageError(
            "the optimizer divides by the spread of slopes along random directions, and this "
            "estimator's gradient is made of something else; choose RandomPerturbation, SPSA or "
            "ForwardGradient, or another optimizer."
        )
    return float(found)
