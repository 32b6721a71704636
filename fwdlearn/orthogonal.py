"""Orthogonal noise for the outputs of layers: the directions of a row never tell the same twice.

Paper: K. Choromanski, M. Rowland, V. Sindhwani, R. Turner and A. Weller, "Structured evolution with
compact architectures for scalable policy optimization" (ICML 2018,
https://arxiv.org/abs/1804.02395): rows of a Hadamard matrix, with random signs.

Direction k of a row is z_k = H[k] * s, where H is a Hadamard matrix, its columns in a random order,
and s are random signs of the row's own: each z_k is Rademacher noise by itself. With d noisy
numbers in a row the squared error of n directions is d/n - 1 times the squared derivative, against
(d - 1)/n of independent ones; with n the next power of two from d on, nothing is left but what
sigma does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.keys import Key, stream_id
from fwdlearn.noise import GivenNoise, Output


@dataclass(frozen=True, kw_only=True)
class OrthogonalNoise(GivenNoise):
    """Numbers of sets of orthogonal directions.

    Args:
        full: directions of a whole set, a power of two.
    """

    full: int

    def overlap(self, count: Tensor) -> Tensor:
        # Whole sets tell all there is; what is left over is a random part of one.
        over = count % self.full
        return over * (self.full - over) / (max(self.full - 1, 1) * count.clamp(min=1))


def orthogonal_noise(
    key: Key,
    sites: Mapping[str, Output],
    plan: Plan,
    scales: Mapping[str, float] | None,
    only: Collection[str],
    device: torch.device | str = "cpu",
) -> OrthogonalNoise:
    """Signs, of which those of a row (or of the rows that share directions) are orthogonal.

    Held in memory, unlike drawn noise: as many numbers as directions times noisy numbers of a row.

    Args:
        key: names the random signs.
        sites: name -> `Output`, from the oracle.
        plan: which rows get which directions.
        scales: name -> size of the noise there; 1 where a name is missing.
        only: the layers that get noise.
        device: where the numbers go.
    """
    names = [name for name in sites if name in only]
    sizes = [math.prod(sites[name].shape) for name in names]
    # Whose directions begin at the same number has the same, wherever its rows stand.
    pairs, numbers = plan.row.cpu() // plan.sharing, plan.direction.cpu()
    begin = torch.full((int(pairs.max()) + 1,), len(numbers)).scatter_reduce_(
        0, pairs, numbers, "amin"
    )
    group = torch.empty(plan.directions, dtype=torch.int64)
    group[numbers] = begin[pairs]
    position = torch.arange(len(group)) - group
    key, full = key.fold("orthogonal"), _power(sum(sizes))
    # Columns repeat where rows are few: those of a large Hadamard matrix do so by themselves.
    order = min(_power(int(position.max()) + 1), full)
    matrix, turn, columns = _hadamard(order), position // full, key.permutation(full) % order
    values, column = {}, 0
    for name, size in zip(names, sizes, strict=True):
        points = matrix[position % order][:, columns[column : column + size]]
        points = points * _signs(key, name, group, turn, size)
        dtype = torch.promote_types(sites[name].dtype, torch.float32)
        values[name] = points.to(device, dtype).reshape(-1, *sites[name].shape)
        column += size
    return OrthogonalNoise(values, scales, full=full)


def _power(count: int) -> int:
    """The next power of two, from `count` on."""
    return 1 << (count - 1).bit_length()


def _hadamard(order: int) -> Tensor:
    """int8 [order, order], Sylvester's."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _signs(key: Key, name: str, group: Tensor, turn: Tensor, size: int) -> Tensor:
    """int8 [directions, size]: the same for the directions of one group and turn."""
    drawn, where = torch.unique(torch.stack((group, turn)), dim=1, return_inverse=True)
    low, high = (torch.tensor(word) for word in stream_id(name))
    # Turns are few: a group's lie side by side.
    number = drawn[0] * (int(turn.max()) + 1) + drawn[1]
    words = key.words(torch.arange(-(-size // 128)), number.unsqueeze(1), (low, high))
    bits = (words.unsqueeze(-1) >> torch.arange(32)) & 1
    return (1 - 2 * bits.flatten(1)[:, :size]).to(torch.int8)[where]
