"""Dropout whose masks are a function of (key, row, place in the model), not of when it runs.

All queries of a row in one step see the same mask, so that a loss difference measures the
direction and not the mask, and the global generators stay untouched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fwdlearn.engine.trace import opened
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key, stream_id

_WHOLE_CHANNELS = {F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout}


class KeyedDropout(TorchFunctionMode):
    """Replaces every dropout of the forward passes run inside it.

    Args:
        key: of the step.
        row: int64 [rows], the row of the batch that each row of the pass stands for.
    """

    def __init__(self, key: Key, row: Tensor) -> None:
        super().__init__()
        self.key, self.row = key, row
        self.place = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout) or func in _WHOLE_CHANNELS:
            return self._dropout(func in _WHOLE_CHANNELS, *args, **kwargs)
        if func is F.scaled_dot_product_attention and _probability(args, kwargs):
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            inside = opened(func)
            assert inside is not None
            with self:
                return inside(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self,
        channels: bool,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool | None = None,
    ) -> Tensor:
        if not (training if train is None else train) or p == 0:
            return input
        shape = (*input.shape[:2], *[1] * (input.dim() - 2)) if channels else input.shape
        out = input * self._mask(torch.Size(shape), p, input)
        return input.copy_(out) if inplace else out

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            repeat = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
        scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -math.inf)
            else:
                scores = scores + attn_mask
        weights = scores.softmax(-1)
        return (weights * self._mask(weights.shape, dropout_p, weights)) @ value

    def _mask(self, shape: torch.Size, p: float, like: Tensor) -> Tensor:
        entries, rest = divmod(math.prod(shape), len(self.row))
        if rest or not shape or shape[0] % len(self.row):
            raise UsageError(
                f"dropout on a tensor of shape {tuple(shape)} cannot be told apart by row; keep "
                "the rows first, or train without train_mode."
            )
        words = stream_id(f"place {self.place}")
        self.place += 1
        stream = torch.tensor(words[0]).to(like.device), torch.tensor(words[1]).to(like.device)
        block = torch.arange(-(-entries // 4), device=like.device)
        drawn = self._words(block, stream).flatten(1)[:, :entries]
        return (drawn >= int(p * 2**32)).to(like.dtype).reshape(shape) / (1 - p)

    def _words(self, block: Tensor, stream: tuple[Tensor, Tensor]) -> Tensor:
        """int64 [rows, blocks, 4]."""
        return self.key.words(block, self.row.unsqueeze(1), stream)


def _probability(args: Sequence[Any], kwargs: Any) -> float:
    return args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
