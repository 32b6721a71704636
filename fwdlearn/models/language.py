"""Language models: the tokens that are asked for, words to choose from, and whole answers.

Only the outputs that are asked for reach the layer that makes logits of them, so that nothing of
the size [tokens, vocabulary] is made for prompts and padding.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.errors import UsageError
from fwdlearn.objectives import NOT_COUNTED


class Answer(NamedTuple):
    """What a model has said.

    Args:
        logits: [rows, asked, vocabulary] of the tokens that were asked for, or None.
        tokens: int64 [rows, new tokens], the answer.
        scores: [rows, new tokens], the logit of each token of it.
        tokenizer: makes texts of them.
    """

    logits: Tensor | None
    tokens: Tensor
    scores: Tensor
    tokenizer: Any

    def texts(self) -> list[str]:
        """The answer of each row, up to where it ends."""
        end = self.tokenizer.eos_token_id
        rows = [row[: row.index(end)] if end in row else row for row in self.tokens.tolist()]
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def wanted(self, targets: Tensor) -> list[str]:
        """What the data has in place of the answer: int64 [rows, asked], as texts."""
        rows = [[token for token in row if token >= 0] for row in targets.tolist()]
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))


class LanguageModel(nn.Module):
    """Asks a model of transformers for some tokens of its texts, or for answers.

    Args:
        model: with an output layer over a vocabulary.
        tokenizer: that it was trained with.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.__dict__["tokenizer"] = model, tokenizer
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._places: Tensor | None = None
        head = model.get_output_embeddings()
        if head is None:
            raise UsageError(
                f"{type(model).__name__} has no layer that makes logits over a vocabulary; a "
                "language model is needed here."
            )
        head.register_forward_pre_hook(self._narrow)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        places: Tensor | None = None,
        choices: Tensor | None = None,
        options: Tensor | None = None,
        divisors: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        room: Tensor | None = None,
    ) -> Any:
        """What the rows ask for.

        Args:
            input_ids, attention_mask: int64 [rows, tokens], or [rows, options, tokens].
            places: int64 [rows, asked], or [rows, options, asked]: the token whose output is
                asked for.
            choices: int64 [rows, classes]: tokens among which the only place chooses.
            options: int64 [rows, options, asked]: the tokens that stand after the places, -100
                where there are fewer.
            divisors: int64 [rows, options]: the log-probability of an option is divided by it; 0
                for one that is not there.
            prompt_ids, prompt_mask: int64 [rows, tokens], padded on the left.
            room: int64 [rows, new tokens], the size of the answer.

        Returns:
            Logits [rows, asked, vocabulary], [rows, classes], [rows, options]; an `Answer` where
            there is room for one.
        """
        logits = None
        if input_ids is not None:
            assert attention_mask is not None and places is not None
            flat = [value.flatten(0, -2) for value in (input_ids, attention_mask, places)]
            logits = self._logits(*flat)
        if room is not None:
            assert prompt_ids is not None and prompt_mask is not None
            said = self._answer(prompt_ids, prompt_mask, room.shape[1])
            return Answer(logits, *said, self.tokenizer)
        assert logits is not None
        if choices is not None:
            return logits.squeeze(1).gather(1, choices)
        if options is not None:
            assert divisors is not None
            return _scores(logits, options, divisors)
        return logits

    def _logits(self, ids: Tensor, mask: Tensor, places: Tensor, **more: Any) -> Tensor:
        self._places = places
        try:
            output = self.model(input_ids=ids, attention_mask=mask, **more)
        finally:
            self._places = None
        logits: Tensor = output.logits
        return logits

    def _narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs that are asked for, on their way to the layer that makes logits."""
        if self._places is None:
            return args
        hidden = args[0]
        place = self._places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, place), *args[1:])

    def _answer(self, ids: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest token again and again: tokens and their logits, [rows, count].

        The first pass reads the prompt, each other one a token; rows that have ended run on.
        """
        from transformers import DynamicCache

        cache, tokens, scores = DynamicCache(), [], []
        position = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(count):
            more = {"position_ids": position} if self.takes_positions else {}
            last = torch.full_like(ids[:, :1], ids.shape[1] - 1)
            logits = self._logits(ids, mask, last, past_key_values=cache, use_cache=True, **more)
            score, ids = logits.squeeze(1).max(1, keepdim=True)
            tokens.append(ids)
            scores.append(score)
            mask = torch.cat((mask, torch.ones_like(ids)), 1)
            position = position[:, -1:] + 1
        return torch.cat(tokens, 1), torch.cat(scores, 1)


def _scores(logits: Tensor, options: Tensor, divisors: Tensor) -> Tensor:
    """Log-probabilities of texts, float32 [rows, options]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    pairs = (wide.flatten(0, 1), options.flatten())
    losses = F.cross_entropy(*pairs, ignore_index=NOT_COUNTED, reduction="none")
    sums = losses.view(options.shape).sum(-1)
    return torch.where(divisors > 0, -sums / divisors.clamp(min=1), float("-inf"))
