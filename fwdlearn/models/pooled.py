"""A linear classifier on the mean of an encoder's outputs: how sentence encoders are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fwdlearn.engine.quantized import quantized_layers
from fwdlearn.errors import UsageError
from fwdlearn.models.lora import adapters, folded_state

_HEAD = "head.safetensors"


class MeanPooled(nn.Module):
    """Maps tokens to logits [rows, outputs]: the encoder, a mean over tokens, a linear layer.

    Beside a first-token head, whose features share a large common part, the mean of a sentence
    encoder gives a new classifier a gradient that stands out from the noise of an estimate.

    Args:
        encoder: a transformers model whose output has `last_hidden_state`.
        outputs: classes, or values to predict.
    """

    def __init__(self, encoder: Any, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        # It would be trained on noise: nothing reads what it puts out.
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        width = encoder.config.hidden_size
        self.classifier = nn.Linear(width, outputs, dtype=encoder.dtype)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        weight = attention_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
        mean = (output.last_hidden_state * weight).sum(1) / weight.sum(1)
        return self.classifier(mean)

    def save_pretrained(self, target: Path) -> None:
        """Writes the encoder for `AutoModel.from_pretrained`, and the classifier beside it."""
        state = folded_state(self.encoder) if adapters(self.encoder) else None
        plain = not quantized_layers(self.encoder)
        self.encoder.save_pretrained(target, state_dict=state, save_original_format=plain)
        self.save_head(target)

    def save_head(self, target: Path) -> None:
        """Writes the classifier into a folder."""
        head = {k: v.detach().cpu().contiguous() for k, v in self.classifier.state_dict().items()}
        save_file(head, target / _HEAD)

    def load_head(self, folder: Path) -> None:
        """Takes the classifier that `save_pretrained` left in a folder, where there is one.

        Raises:
            UsageError: the file cannot be read.
        """
        if not (folder / _HEAD).is_file():
            return
        try:
            head = load_file(folder / _HEAD)
        except SafetensorError as error:
            raise UsageError(f"{folder / _HEAD}: cannot be read ({error}).") from error
        own = self.classifier.state_dict()
        # One for other classes gives way to a new one, as transformers' own heads do.
        if {k: v.shape for k, v in head.items()} == {k: v.shape for k, v in own.items()}:
            with torch.no_grad():
                self.classifier.load_state_dict(head)
