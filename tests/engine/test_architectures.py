"""Twelve architectures of transformers, built small: each takes a step on the fast rung."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.estimators import ForwardGradient, LikelihoodRatio
from fwdlearn.keys import Key
from fwdlearn.models.built import weights_from
from fwdlearn.oracle import ModelOracle

from .models import cross_entropy, images, next_token, tokens

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = TEXT | {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8}
PIXELS = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
PIXELS |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
DISTIL = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
OPT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT |= {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


class Pooled(nn.Module):
    """A classifier on the mean of what an encoder without a head puts out."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, 3)

    def forward(self, **inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(**inputs).last_hidden_state.mean(1))
        return out


@dataclass(frozen=True)
class Case:
    """Names of a configuration and of a model in transformers, and what they are given."""

    config: str
    model: str
    settings: dict[str, Any]
    batch: Callable[[int], Batch] = tokens
    objective: Callable[[Any, Tensor], Tensor] = cross_entropy
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model


def causal(name: str, settings: dict[str, Any]) -> Case:
    return Case(f"{name}Config", f"{name}ForCausalLM", settings, objective=next_token)


CLASSES = TEXT | {"intermediate_size": 24, "num_labels": 3, "max_position_embeddings": 40}
CASES = {
    "BERT": Case("BertConfig", "BertForSequenceClassification", CLASSES),
    "RoBERTa": Case("RobertaConfig", "RobertaForSequenceClassification", CLASSES),
    "DistilBERT": Case(
        "DistilBertConfig", "DistilBertForSequenceClassification", DISTIL | {"num_labels": 3}
    ),
    "GPT-2": Case("GPT2Config", "GPT2LMHeadModel", GPT2, objective=next_token),
    "OPT": causal("OPT", OPT),
    "Llama": causal("Llama", DECODER),
    "Qwen": causal("Qwen2", DECODER),
    "Mistral": causal("Mistral", DECODER),
    "Gemma": causal("Gemma", DECODER),
    # Where some blocks have padding and others have none, transformers takes another path through
    # T5's position bias, and the fold steps down and says so.
    "T5": Case("T5Config", "T5EncoderModel", T5, partial(tokens, padded=False), wrap=Pooled),
    "ViT": Case("ViTConfig", "ViTForImageClassification", PIXELS, images),
    "DeiT": Case("DeiTConfig", "DeiTForImageClassification", PIXELS, images),
}


def built(name: str) -> tuple[Engine, Batch]:
    case = CASES[name]
    with weights_from(0):
        config = getattr(transformers, case.config)(**case.settings)
        model = case.wrap(getattr(transformers, case.model)(config)).double().eval()
    batch = case.batch(4)
    batch = Batch(batch.args, batch.targets % 3, batch.kwargs).to("cpu", torch.float64)
    return Engine(model, case.objective), batch


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_the_fast_rung_and_is_right(name: str) -> None:
    engine, batch = built(name)
    oracle, plan = ModelOracle(engine, batch), Plan.uniform(4, 2)
    family = Directions(Key.root(0), oracle.params, plan.directions)
    found = oracle.losses(plan.row, family, plan.direction, 1e-3)
    assert engine.choice is not None and engine.choice.rung == "fold", engine.choice
    slow = Engine(engine.model, engine.objective, rung="sequential")
    expected = ModelOracle(slow, batch).losses(plan.row, family, plan.direction, 1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", [ForwardGradient(), LikelihoodRatio(noise="hybrid")], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_other_families_run(name: str, estimator: Any) -> None:
    engine, batch = built(name)
    oracle = ModelOracle(engine, batch)
    state = estimator.init(oracle.params)
    key, plan = Key.root(1), Plan.uniform(4, 2)
    found, _ = estimator.estimate(oracle, oracle.params, state, key=key, plan=plan)
    assert sum(float(value.square().sum()) for value in found.grad.values()) > 0
