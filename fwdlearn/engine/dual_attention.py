"""Tangents of fused attention, for which torch has no forward derivative.

With S = c Q K.T + M, P = softmax(S) and O = P V,

    dS = c (dQ K.T + Q dK.T) + dM,    dO = (P dS) V + P dV - rowsum(P dS) O,

where P dS is entry by entry. The values come from the fused kernel. Weights and their tangents
exist for one direction and some of the queries at a time, so that memory grows with the length and
not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlearn.engine.dual import Call
from fwdlearn.engine.tangents import aligned

# Attention weights that are alive at once, in entries: what caches hold.
_BLOCK = 2**20


def attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p:
        return call.again(
            _explicit, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    out = call.plain()
    held = [call.tangent(t) for t in (query, key, value, attn_mask)]
    count = max(len(t) for t in held if t is not None)
    heads = _Heads(out.shape[:-2], query.shape[-3] // key.shape[-3] if enable_gqa else 1)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k, v, o = (heads.flat(t) for t in (query, key, value, out))
    # Scaled once here, not in every direction.
    q, near = q * factor, k * factor
    # Laid out as the fused kernel lays out its result, so that the model's next view is one.
    tangent = torch.empty_like(out.unsqueeze(0).expand(count, *out.shape))
    for some in _parts(count, len(q) * k.shape[1]):
        dq, dk, dv = (None if t is None else heads.tangents(t[some]) for t in held[:3])
        for part in _parts(q.shape[1], len(q) * k.shape[1] * (some.stop - some.start)):
            mask = None if attn_mask is None else heads.flat(_of(attn_mask, part))
            seen = q[:, part]
            weights = _weights(seen, k, mask, part.start if is_causal else None)
            dmask = None if held[3] is None else heads.tangents(_of(held[3][some], part))
            moved = _scores(seen, near, None if dq is None else dq[:, :, part], dk, dmask)
            parts = []
            if moved is not None:
                moved = moved.mul_(weights.unsqueeze(1))
                pushed = torch.bmm(moved.flatten(1, 2), v).view(*moved.shape[:3], -1)
                parts.append(pushed.addcmul_(o[:, None, part], moved.sum(-1, True), value=-1))
            if dv is not None:
                mixed = torch.bmm(weights, dv.transpose(1, 2).flatten(2))
                parts.append(mixed.unflatten(2, (-1, dv.shape[-1])).transpose(1, 2))
            into = tangent[some, ..., part, :]
            shaped = [one.unflatten(0, heads.shape).movedim(-3, 0) for one in parts]
            into.copy_(shaped[0]) if len(shaped) == 1 else torch.add(*shaped, out=into)
    return call.carry(out, tangent)


def _scores(
    q: Tensor, k: Tensor, dq: Tensor | None, dk: Tensor | None, dmask: Tensor | None
) -> Tensor | None:
    """[batch * heads, K, queries, keys]: the tangents of what the softmax is taken of.

    Both `q` and `k` are scaled.
    """
    scores = None if dmask is None else dmask.clone()
    if dq is not None:
        part = torch.bmm(dq.flatten(1, 2), k.mT).view(*dq.shape[:3], -1)
        scores = part if scores is None else part.add_(scores)
    if dk is not None:
        n, count, keys, width = dk.shape
        wide = q.unsqueeze(1).expand(-1, count, -1, -1).reshape(n * count, -1, width)
        thin = dk.reshape(n * count, keys, width).mT
        if scores is None:
            scores = torch.bmm(wide, thin)
        else:
            scores = scores.view(n * count, -1, keys).baddbmm_(wide, thin)
        scores = scores.view(n, count, -1, keys)
    return scores


@dataclass(frozen=True)
class _Heads:
    """Batch and heads of all operands as one axis.

    Args:
        shape: of the axes in front of those of a matrix.
        groups: heads of the query that share one of key and value.
    """

    shape: torch.Size
    groups: int

    def flat(self, value: Tensor) -> Tensor:
        """[batch * heads, length, width]."""
        return self._seen(value).reshape(-1, *value.shape[-2:])

    def tangents(self, value: Tensor) -> Tensor:
        """[batch * heads, K, length, width] of [K, ...]."""
        seen = self._seen(aligned(value, len(self.shape) + 2), len(value)).movedim(0, -3)
        return seen.reshape(-1, *seen.shape[-3:])

    def _seen(self, value: Tensor, *lead: int) -> Tensor:
        if self.groups > 1 and value.dim() > 2 and 1 < value.shape[-3] < self.shape[-1]:
            value = value.repeat_interleave(self.groups, -3)
        return value.expand(*lead, *self.shape, *value.shape[-2:])


def _of(mask: Tensor, part: slice) -> Tensor:
    """The part of a mask that some queries see."""
    return (
        mask[..., part, :]
        if mask.shape[-2] > 1
        else mask.expand(*mask.shape[:-2], part.stop - part.start, -1)
    )


def _parts(length: int, weights: int) -> Iterator[slice]:
    """Slices of so many times `weights` entries that they fit in a fixed space."""
    size = max(1, _BLOCK // max(1, weights))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, start: int | None) -> Tensor:
    """[batch * heads, queries, keys]; with `start`, query i sees the keys up to `start + i`."""
    scores = query @ key.mT
    if start is not None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores.masked_fill_(later.triu(start + 1), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -math.inf)
    elif mask is not None:
        scores += mask
    if mask is None:
        return scores.softmax(-1)
    # A query that sees nothing has weights of zero.
    return torch.ops.aten._safe_softmax(scores, -1)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Attention operation by operation, so that its weights can drop out."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value
