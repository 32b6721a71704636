"""Undoing h A where A may lack rank: the erased part of h is known, and A is widened by it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fragment(NamedTuple):
    """What a product with a matrix A [n, m] erases.

    The basis is kept because a decomposition made again need not give the same one.

    Args:
        values: [..., k], the erased part in the basis.
        basis: [n, k], orthonormal, its columns (nearly) in the left null space of A.
    """

    values: Tensor
    basis: Tensor


def erased(matrix: Tensor, cutoff: float) -> Tensor | None:
    """Directions that h -> h A erases or, with a cutoff, nearly erases.

    Args:
        matrix: A [n, m].
        cutoff: singular values below `cutoff` times the largest count as zero.

    Returns:
        [n, k] orthonormal, or None for k = 0.
    """
    rows, columns = matrix.shape
    if cutoff:
        left, values, _ = torch.linalg.svd(matrix)
        basis = left[:, int((values > cutoff * values[0]).sum()) :]
    elif rows > columns:
        basis = torch.linalg.qr(matrix, "complete")[0][:, columns:]
    else:
        return None
    # A copy, or the whole factor would stay alive with it.
    return basis.clone(memory_format=torch.contiguous_format) if basis.shape[1] else None


def keep(h: Tensor, basis: Tensor | None) -> Fragment | None:
    """The part of h [..., n] along a basis [n, k]."""
    return None if basis is None else Fragment(h @ basis, basis)


def right_inverse(matrix: Tensor, basis: Tensor | None) -> Tensor:
    """X [m + k, n] with h = [h A, h basis] X for every h [..., n].

    Args:
        matrix: A [n, m].
        basis: [n, k] of what A erases, or None.
    """
    if basis is not None:
        # In one scale, or the factors of the two would lose digits.
        scale = matrix.norm() / min(matrix.shape) ** 0.5
        matrix = torch.cat([matrix, scale * basis], 1)
    if matrix.shape[0] == matrix.shape[1]:
        # Nothing is raised where it is singular: then the walk misses its next anchor.
        inverse = torch.linalg.inv_ex(matrix)[0]
    else:
        q, r = torch.linalg.qr(matrix.mT)
        inverse = torch.linalg.solve_triangular(r.mT, q, upper=False, left=False)
    if basis is not None:
        inverse[-basis.shape[1] :] *= scale
    return inverse


def undo(product: Tensor, matrix: Tensor, fragment: Fragment | None) -> Tensor:
    """h A [..., m] and what A [n, m] erased -> h [..., n]."""
    if fragment is None:
        return product @ right_inverse(matrix, None)
    joined = torch.cat([product, fragment.values], -1)
    return joined @ right_inverse(matrix, fragment.basis)
