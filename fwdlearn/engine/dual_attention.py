"""Tangents of fused attention, for which torch has no forward derivative.

With S = c Q K.T + M, P = softmax(S) and O = P V,

    dS = c (dQ K.T + Q dK.T) + dM,    dO = (P dS) V + P dV - rowsum(P dS) O,

where P dS is entry by entry. The values come from the fused kernel. Directions lie between queries
and entries, [batch * heads, queries, K, ...], so that all share each of the four products. Weights
and their tangents exist for some rows, queries and directions at a time: they stay in the cache,
and memory grows with the length and not with its square.
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
from fwdlearn.engine.dual_generic import generic
from fwdlearn.engine.tangents import aligned

# Tangents of attention weights that are alive at once, in entries: what caches hold.
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
    if out.dim() < 3:
        return generic(call)
    held = [call.tangent(t) for t in (query, key, value, attn_mask)]
    count = max(len(t) for t in held if t is not None)
    heads = _Heads(out.shape[:-2], query.shape[-3] // key.shape[-3] if enable_gqa else 1)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Scaled once here, not in every direction.
    q, k, v = (heads.seen(t) for t in (query * factor, key, value))
    near = heads.seen(key * factor)
    moving = [None if t is None else heads.seen(aligned(t, out.dim()), count) for t in held]
    mask = None if attn_mask is None else heads.seen(attn_mask)
    # Laid out as the fused kernel lays out its result, so that the model's next view is one.
    tangent = torch.empty_like(out.unsqueeze(0).expand(count, *out.shape))
    wide, (rows, length) = math.prod(out.shape[1:-2]) * key.shape[-2], (len(out), out.shape[-2])
    for row in _parts(rows, wide * count * length):
        among = wide * (row.stop - row.start)
        kv = tuple(_flat(t[row]) for t in (k, near, v))
        for part in _parts(length, among * min(count, 8)):
            seen = _flat(q[row, ..., part, :])
            shown = None if mask is None else _flat(_of(mask[row], part))
            weights = _weights(seen, kv[0], shown, part.start if is_causal else None)
            mean = _flat(out[row, ..., part, :])
            for some in _parts(count, among * (part.stop - part.start)):
                dq, dk, dv, dm = (None if t is None else t[some, row] for t in moving)
                into = tangent[some, row, ..., part, :].movedim(0, -2)
                scores = _scores(
                    seen,
                    kv[1],
                    None if dq is None else dq[..., part, :],
                    dk,
                    None if dm is None else _of(dm, part),
                )
                _mix(into, weights, scores, kv[2], dv, mean)
    return call.carry(out, tangent)


def _scores(
    q: Tensor, k: Tensor, dq: Tensor | None, dk: Tensor | None, dmask: Tensor | None
) -> Tensor | None:
    """[batch * heads, queries, K, keys]: the tangents of what the softmax is taken of.

    Both `q` and `k` are scaled. Tangents are [K, batch, ..., length, width].
    """
    scores = None
    if dk is not None:
        wide = dk.movedim(0, -3).reshape(len(q), -1, k.shape[-1])
        scores = torch.bmm(q, wide.mT).view(*q.shape[:2], len(dk), -1)
    if dq is not None:
        thin = _between(dq).flatten(1, 2)
        if scores is None:
            scores = torch.bmm(thin, k.mT)
        else:
            scores = scores.view(len(q), -1, k.shape[1]).baddbmm_(thin, k.mT)
        scores = scores.view(*q.shape[:2], len(dq), -1)
    if dmask is not None:
        shift = _between(dmask)
        if scores is None:
            return shift.expand(*shift.shape[:3], k.shape[1]).clone()
        scores.add_(shift)
    return scores


def _mix(
    into: Tensor, weights: Tensor, scores: Tensor | None, v: Tensor, dv: Tensor | None, o: Tensor
) -> None:
    """Writes the tangents of the result.

    Args:
        into: [batch, ..., queries, K, width].
        weights: [batch * heads, queries, keys].
        scores: from `_scores`; overwritten.
        v: [batch * heads, keys, width].
        dv: [K, batch, ..., keys, width].
        o: the result, [batch * heads, queries, width].
    """
    total = None
    if dv is not None:
        total = torch.bmm(weights, _between(dv).flatten(2))
        total = total.view(len(v), -1, v.shape[-1])
    if scores is None:
        assert total is not None
        into.copy_(total.view(into.shape))
        return
    moved = scores.mul_(weights.unsqueeze(2))
    flat = moved.flatten(1, 2)
    total = torch.bmm(flat, v) if total is None else total.baddbmm_(flat, v)
    total = total.view(*moved.shape[:3], -1)
    into.copy_(total.addcmul_(o.unsqueeze(2), moved.sum(-1, True), value=-1).view(into.shape))


@dataclass(frozen=True)
class _Heads:
    """Batch and heads of all operands as one axis.

    Args:
        shape: of the axes in front of those of a matrix.
        groups: heads of the query that share one of key and value.
    """

    shape: torch.Size
    groups: int

    def seen(self, value: Tensor, *lead: int) -> Tensor:
        """[*lead, *shape, length, width], a view where no heads are shared."""
        if self.groups > 1 and value.dim() > 2 and 1 < value.shape[-3] < self.shape[-1]:
            value = value.repeat_interleave(self.groups, -3)
        return value.expand(*lead, *self.shape, *value.shape[-2:])


def _flat(value: Tensor) -> Tensor:
    """[batch * heads, length, width]."""
    return value.reshape(-1, *value.shape[-2:])


def _between(value: Tensor) -> Tensor:
    """[batch * heads, length, K, width] of [K, batch, ..., length, width]."""
    return value.movedim(0, -2).reshape(-1, value.shape[-2], len(value), value.shape[-1])


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
