"""Architectures of transformers, built small from their configurations: the fast rung, a step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import ForwardGradient, LikelihoodRatio, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.models.pooled import MeanPooled
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle, forbid_backward
from tests.models.test_language_model import MODELS as LANGUAGE

library = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "intermediate_size": 48, "vocab_size": 60, "num_labels": 3, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {
    **SIZES,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 1,
    "num_labels": 3,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def text(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(library, f"{name}Config")(**settings)
        return getattr(library, f"{name}ForSequenceClassification")(config)

    return build


def image(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(library, f"{name}Config")(**IMAGE)
        return getattr(library, f"{name}ForImageClassification")(config)

    return build


def t5() -> nn.Module:
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
    return MeanPooled(library.T5EncoderModel(library.T5Config(**sizes, vocab_size=60)), 3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BERT": text("Bert", **TEXT),
    "RoBERTa": text("Roberta", **{**TEXT, "pad_token_id": 1}, max_position_embeddings=40),
    "DistilBERT": text(
        "DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=60, num_labels=3
    ),
    "GPT-2": text("GPT2", n_embd=32, n_layer=2, n_head=4, vocab_size=60, num_labels=3, **ENDS),
    "OPT": text("OPT", **SIZES, ffn_dim=48, vocab_size=60, num_labels=3, word_embed_proj_dim=32),
    "Llama": text("Llama", **TEXT),
    "Qwen2": text("Qwen2", **GROUPED),
    "Qwen3": text("Qwen3", **GROUPED, head_dim=8),
    "Mistral": text("Mistral", **GROUPED),
    "Gemma": text("Gemma", **GROUPED, head_dim=8),
    "T5 encoder": t5,
    "ViT": image("ViT"),
    "DeiT": image("DeiT"),
}
PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
SECTION = PAGE.read_text("utf-8").partition("## Architectures")[2].partition("\n## ")[0]
# Name -> tested class, rung of losses, rung of exact slopes, rung as a causal language model.
TOLD = {
    name: (kind, losses, slopes, causal)
    for name, kind, losses, slopes, causal in re.findall(
        r"^\| (.+?) \| `(\w+)` \| (\w+) \| (\w+) \| (\w*) ?\|$", SECTION, re.MULTILINE
    )
}
ESTIMATORS: list[Estimator] = [RandomPerturbation(), ForwardGradient(), LikelihoodRatio()]


def batch(name: str) -> Batch:
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(4) % 3
    if name in ("ViT", "DeiT"):
        pixels = torch.randn(4, 1, 16, 16, generator=generator)
        return Batch((), targets, {"pixel_values": pixels})
    mask = (torch.arange(8) < torch.tensor([[5], [7], [8], [3]])).long()
    ids = torch.randint(3, 60, (4, 8), generator=generator)
    padding = 1 if name == "RoBERTa" else 0
    inputs: dict[str, Tensor] = {"input_ids": torch.where(mask > 0, ids, padding)}
    return Batch((), targets, {**inputs, "attention_mask": mask})


def test_the_page_tells_of_these_and_no_others() -> None:
    assert list(TOLD) == list(MODELS)
    causal = {config.removesuffix("Config") for config, _ in LANGUAGE.values()}
    for name, (kind, _, _, told) in TOLD.items():
        own = next((prefix for prefix in causal if kind.startswith(f"{prefix}For")), None)
        assert (own is not None) == bool(told), name
        causal.discard(own or "")
    assert not causal
    short = [getattr(one, "values", (one,))[0] for one in SHORT]
    dtypes = [str(one).removeprefix("torch.") for one in (torch.float32, torch.float64, *short)]
    assert (
        f"tested in {', '.join(dtypes[:-1])} and {dtypes[-1]}, exact slopes in float32" in SECTION
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_runs_a_step_on_the_fast_rung(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    rows = batch(name)
    kind, losses, slopes, causal = TOLD[name]
    assert kind in {type(module).__name__ for module in model.modules()}
    assert losses == "fold" and causal in ("fold", "")
    with forbid_backward():
        engine = Engine(model, cross_entropy)
        choice = engine.choose(rows)
        assert choice.rung == losses, choice.reason
        for estimator in ESTIMATORS:
            oracle = ModelOracle(engine, rows)
            made, _ = estimator.estimate(
                oracle,
                oracle.params,
                estimator.init(oracle.params),
                key=Key.root(0),
                plan=Plan.uniform(4, 2),
            )
            norms = [float(made.grad[one].norm()) for one in oracle.params]
            assert all(norm < float("inf") for norm in norms), type(estimator).__name__
            assert any(norms), type(estimator).__name__
        assert engine.exact.choice is not None and engine.exact.choice.rung == slopes


# The two take the same way; a second a model is enough for everyday.
SHORT = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("name", list(MODELS))
def test_short_dtypes_run_there_too(name: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().to(dtype).eval()
    rows = batch(name).to("cpu", dtype)
    with forbid_backward():
        engine = Engine(model, cross_entropy)
        choice = engine.choose(rows)
        assert choice.rung == "fold", choice.reason
        oracle = ModelOracle(engine, rows)
        made, _ = RandomPerturbation(sigma=0.01).estimate(
            oracle, oracle.params, None, key=Key.root(0), plan=Plan.uniform(4, 2)
        )
        norms = [float(made.grad[one].float().norm()) for one in oracle.params]
    assert all(norm < float("inf") for norm in norms) and any(norms)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_fast_rung_is_right(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().double().eval()
    # With padding in some blocks and none in others, T5 takes another path and the fold steps down.
    rows = batch(name).select(torch.tensor([0, 1, 3])).to("cpu", torch.float64)
    plan, losses = Plan.uniform(3, 2), []
    for rung in ("fold", "sequential"):
        oracle = ModelOracle(Engine(model, cross_entropy, rung=rung), rows)
        family = Directions(Key.root(0), oracle.params, plan.directions)
        losses.append(oracle.losses(plan.row, family, plan.direction, 1e-3))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-12)


def test_a_mixture_of_experts_runs_slowly_as_the_page_says() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = text("Mixtral", **GROUPED, num_local_experts=4)().eval()
    with forbid_backward():
        choice = Engine(model, cross_entropy).choose(batch("Llama"))
    assert choice.rung == "sequential" and "fold: " in choice.reason
    assert "tried: Mixtral" in SECTION
