"""Batches of rows of much the same length, so that little of a batch is padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fwdlearn.keys import Key


def bucketed(order: Tensor, lengths: Tensor, batch: int, buckets: int, key: Key) -> Tensor:
    """An order of rows in which those of a batch are of much the same length.

    The rows of `buckets` batches, which come together by chance, are sorted by length and divided;
    all batches are then shuffled. Which rows meet stays random, and every row comes as often as it
    does without.

    Args:
        order: int64 [rows], a random order.
        lengths: int64 [all rows].
        batch: rows of a batch.
        buckets: batches that are sorted together, at least 1.
        key: of the order of the batches.

    Returns:
        int64 [whole batches times batch]; what no batch is full of is left out.
    """
    whole = order[: len(order) // batch * batch]
    parts = [part[lengths[part].argsort(stable=True)] for part in whole.split(batch * buckets)]
    batches = torch.cat(parts).view(-1, batch)
    return batches[key.fold("buckets").permutation(len(batches))].flatten()
