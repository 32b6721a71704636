"""A frozen sentence encoder behind a function, with a prompt and a classifier to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwdlearn.batch import Batch
from fwdlearn.blackbox import BlackBox
from fwdlearn.data.types import DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.models.built import Built, weights_from
from fwdlearn.models.transformers import transformers


def prompted(
    info: DataInfo,
    path: str | Path,
    tokens: int = 8,
    rows_per_call: int | None = None,
    seed: int = 0,
) -> Built:
    """Builds a black box: vectors put before the words of every text, and a linear classifier.

    The encoder is never trained and nothing looks into it: all that training sees of it are the
    logits that it answers with. The first prompt is the mean word vector, with a little noise.

    Args:
        info: of the data; text.
        path: of the encoder, as for `transformers`.
        tokens: vectors of the prompt, at least 1; with the words of a text no more than the
            encoder reads.
        rows_per_call: the most rows that one call of the encoder takes, or None for no limit.
        seed: of the prompt and the classifier.

    Raises:
        MissingError: transformers is not installed, or there is no such model.
        UsageError: the data are no texts, or an argument is out of range.
    """
    if info.kind != "text":
        raise UsageError(f"prompted reads text, not {info.kind}.")
    if isinstance(tokens, bool) or tokens < 1:
        raise UsageError(f"prompted(tokens=...) must be at least 1, got {tokens!r}.")
    built = transformers(info, path, head="AutoModel", seed=seed)
    encoder: Any = built.module.requires_grad_(False)
    words = encoder.get_input_embeddings().weight
    with weights_from(seed):
        noise = torch.randn(tokens, words.shape[1]) * words.std() / 10
        classifier = torch.randn(info.outputs, words.shape[1]) * 0.02
    params = {
        "prompt": words.mean(0) + noise,
        "classifier.weight": classifier,
        "classifier.bias": torch.zeros(info.outputs),
    }

    def logits(params: Mapping[str, Tensor], rows: Batch) -> Tensor:
        ids, mask = rows.kwargs["input_ids"], rows.kwargs["attention_mask"]
        prompt = params["prompt"].expand(len(ids), -1, -1)
        # No module of the box, so nobody else moves it.
        encoder.to(ids.device)
        inputs = torch.cat((prompt, encoder.get_input_embeddings()(ids)), 1)
        mask = torch.cat((mask.new_ones(len(ids), tokens), mask), 1)
        hidden = encoder(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return mean @ params["classifier.weight"].T + params["classifier.bias"]

    return Built(BlackBox(params, logits, rows_per_call=rows_per_call), built.processor)
