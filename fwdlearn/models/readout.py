"""A small reader of what a frozen encoder says: means of its layers, and detectors of tokens.

A sentence encoder trained for similarity tells less of a text in its last layer than on the way
there. The reader takes the mean over tokens of every layer, and, for each of a few detectors (a
linear unit on the tokens of one layer), the strongest and the mean response; one linear layer makes
logits of it all. The encoder is looked at once a row (`Look`), and a query costs what the reader
costs, a hundredth of a layer of the encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fwdlearn.errors import UsageError

_READER = "reader.safetensors"


class Look(nn.Module):
    """Maps tokens to what `Readout` reads; holds the encoder.

    Args:
        encoder: a transformers model that can put out its hidden states.
        layer: whose output the detectors see, from 0 (the embeddings) to the last; None is two
            thirds of the way up.

    Attributes:
        center, spread: [width], buffers: what is put out is (token - center) / spread; likewise
            mean_center and mean_spread [layers * width]. 0 and 1 until `calibrate`.

    Raises:
        UsageError: there is no such layer.
    """

    center: Tensor
    spread: Tensor
    mean_center: Tensor
    mean_spread: Tensor

    def __init__(self, encoder: Any, layer: int | None = None) -> None:
        super().__init__()
        layers = encoder.config.num_hidden_layers
        layer = -(-2 * layers // 3) if layer is None else layer
        if not 0 <= layer <= layers:
            raise UsageError(
                f"Look(layer=...) must be 0 (the embeddings) to {layers}, got {layer!r}."
            )
        self.encoder, self.layer = encoder, layer
        # It would be trained on noise: nothing reads what it puts out.
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        width = encoder.config.hidden_size
        self.means = width * (layers + 1)
        for name, size in (("", width), ("mean_", self.means)):
            self.register_buffer(f"{name}center", torch.zeros(size))
            self.register_buffer(f"{name}spread", torch.ones(size))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor
    ) -> dict[str, Tensor]:
        """`tokens` [rows, length, width], `mask` [rows, length], `means` [rows, layers * width]."""
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs
        ).hidden_states
        weight = attention_mask.unsqueeze(-1).to(states[0].dtype)
        count = weight.sum(1)
        means = torch.cat([(state * weight).sum(1) / count for state in states], 1)
        return {
            "tokens": (states[self.layer] - self.center) / self.spread,
            "mask": attention_mask,
            "means": (means - self.mean_center) / self.mean_spread,
        }

    def extra_repr(self) -> str:
        return f"layer={self.layer}"

    @torch.no_grad()
    def calibrate(
        self, input_ids: Tensor, attention_mask: Tensor, least: float = 0.05, **inputs: Tensor
    ) -> None:
        """Sets centers and spreads to those of some rows.

        Args:
            input_ids, attention_mask: of the rows.
            least: spread; what hardly varies is not blown up.
        """
        for name in ("", "mean_"):
            getattr(self, f"{name}center").zero_()
            getattr(self, f"{name}spread").fill_(1)
        seen = self(input_ids, attention_mask, **inputs)
        tokens = seen["tokens"][seen["mask"] > 0]
        for name, values in (("", tokens), ("mean_", seen["means"])):
            getattr(self, f"{name}center").copy_(values.mean(0))
            getattr(self, f"{name}spread").copy_(values.std(0).clamp_min(least))


class Readout(nn.Module):
    """Maps what `Look` sees to logits [rows, outputs].

    Args:
        width: numbers of a token.
        means: numbers of the means of a row.
        outputs: classes, or values to predict.
        detectors: linear units on tokens, at least 1.

    Attributes:
        eyes: [detectors, width], the weights of the detectors themselves, as a buffer: which token
            answers strongest has no derivative, so that the choice is made before anything is
            perturbed. Noise then has one number a detector to move, and not one a token.
    """

    eyes: Tensor

    def __init__(self, width: int, means: int, outputs: int, detectors: int = 32) -> None:
        super().__init__()
        self.detectors = nn.Parameter(torch.empty(detectors, width))
        self.head = nn.Linear(means + detectors, outputs)
        nn.init.normal_(self.detectors, std=width**-0.5)
        # The means begin unread, like the head of any probe; detectors nobody reads learn nothing.
        nn.init.zeros_(self.head.weight)
        nn.init.normal_(self.head.weight[:, means:], std=0.1)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("eyes", self.detectors.detach(), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor, means: Tensor) -> Tensor:
        scores = F.linear(tokens, self.eyes)
        place = scores.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).argmax(1)
        chosen = tokens.gather(1, place.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        most = F.gelu(torch.einsum("rdw,dw->rd", chosen, self.detectors))
        out: Tensor = self.head(torch.cat((means, most), 1))
        return out

    # Moved or copied apart, the two would no longer be one.

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.eyes = self.detectors.detach()
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.eyes = self.detectors.detach()


class Reader(nn.Module):
    """The encoder and its reader as one model, as it is used and saved."""

    def __init__(self, look: Look, outputs: int, detectors: int = 32) -> None:
        super().__init__()
        self.look = look
        width = look.encoder.config.hidden_size
        self.readout = Readout(width, look.means, outputs, detectors)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        out: Tensor = self.readout(**self.look(input_ids, attention_mask, **inputs))
        return out

    def save_pretrained(self, target: Path) -> None:
        """Writes the encoder for `AutoModel.from_pretrained`, and the reader beside it."""
        self.look.encoder.save_pretrained(target)
        save_file(self._own(), target / _READER)

    def load_head(self, folder: Path) -> None:
        """Takes the reader that `save_pretrained` left in a folder, where there is one.

        Raises:
            UsageError: the file cannot be read.
        """
        if not (folder / _READER).is_file():
            return
        try:
            kept = load_file(folder / _READER)
        except SafetensorError as error:
            raise UsageError(f"{folder / _READER}: cannot be read ({error}).") from error
        # One of another size gives way to a new one, as transformers' own heads do.
        if {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in self._own().items()}:
            self.load_state_dict(kept, strict=False)

    def _own(self) -> dict[str, Tensor]:
        state = self.state_dict()
        return {
            name: value.detach().cpu().contiguous()
            for name, value in state.items()
            if not name.startswith("look.encoder.")
        }
