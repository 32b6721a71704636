"""Adapters of PEFT: any of them is trained on the fast rung, saved, loaded again."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.cli import main
from fwdlearn.data import DataInfo
from fwdlearn.engine import Engine
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.estimators import RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.models import Built, transformers
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle, forbid_backward

library = pytest.importorskip("transformers")

TEXT = DataInfo("text", (), 3)
WORDS = {
    "input_ids": torch.tensor([[5, 6, 7], [8, 9, 2], [4, 4, 6]]),
    "attention_mask": torch.ones(3, 3, dtype=torch.int64),
}
LAYERS = {
    "LORA": {"r": 2, "lora_alpha": 4},
    "IA3": {},
    "VERA": {"r": 2},
    "LOHA": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
}
PROMPTS = {
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama with a tokenizer."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqr"])}
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = library.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")
    tokenizer.save_pretrained(tmp_path / "llama")
    config = library.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=12,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        library.LlamaModel(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def written(folder: Path, kind: str, settings: dict[str, Any]) -> str:
    (folder / kind).mkdir()
    text = json.dumps({"peft_type": kind, **settings})
    (folder / kind / "adapter_config.json").write_text(text, "utf-8")
    return str(folder / kind)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        output = model(**WORDS)
    return getattr(output, "logits", output)


def trained(built: Built) -> list[str]:
    return [name for name, value in built.module.named_parameters() if value.requires_grad]


@pytest.mark.parametrize("kind", [*LAYERS, *PROMPTS])
def test_it_is_trained_saved_and_loaded(folder: Path, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = written(tmp_path, kind, {**LAYERS, **PROMPTS}[kind])
    built = transformers(TEXT, folder, peft=config)
    names = trained(built)
    assert any("score" in name for name in names) and not any("embed_tokens" in n for n in names)
    with forbid_backward():
        engine = Engine(built.module, cross_entropy)
        oracle = ModelOracle(engine, Batch((), torch.arange(3), WORDS))
        made, _ = RandomPerturbation().estimate(
            oracle, oracle.params, None, key=Key.root(0), plan=Plan.uniform(3, 2)
        )
        assert engine.choice is not None and engine.choice.rung == "fold", engine.choice
        for name in oracle.params:
            engine.params[name].sub_(made.grad[name], alpha=0.05)
    wanted = logits(built.module)
    assert built.save is not None
    built.save(tmp_path / "out")
    again = transformers(TEXT, tmp_path / "out", peft=config)
    torch.testing.assert_close(logits(again.module), wanted, atol=1e-5, rtol=1e-5)
    # PEFT alone, on the model that training began with.
    with torch.random.fork_rng(devices=[]):
        plain = library.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(logits(loaded), wanted, atol=1e-5, rtol=1e-5)
    if kind in LAYERS:
        # And transformers alone, on what is folded.
        with torch.random.fork_rng(devices=[]):
            folded = library.AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "out", local_files_only=True
            )
        torch.testing.assert_close(logits(folded.eval()), wanted, atol=1e-5, rtol=1e-5)


def test_a_prefix_starts_from_what_the_model_says_of_words(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = written(tmp_path, "PREFIX_TUNING", {"num_virtual_tokens": 3})
    built: Any = transformers(TEXT, folder, peft=config, seed=4).module
    prefix = built.prompt_encoder["default"].embedding.weight.detach()
    plain = built.get_base_model()
    # One of the words, alone at the first place, gives the first token of the prefix.
    with torch.inference_mode():
        cache = plain(input_ids=torch.arange(20)[:, None], use_cache=True).past_key_values
    sides = [s for one in cache.layers for s in (one.keys, one.values)]
    known = torch.stack([side.squeeze(2) for side in sides], 1).flatten(1)
    assert (known - prefix[0]).abs().amax(1).min() < 1e-5


def test_a_recipe_has_it(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = written(tmp_path, "LORA", LAYERS["LORA"])
    rows = [{"text": "a b c", "label": "x"}, {"text": "d e", "label": "y"}] * 4
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "r.yaml").write_text(
        f"""\
model: {{name: transformers, path: "{folder}", peft: "{config}"}}
data: {{name: jsonl, path: "{tmp_path}", evaluation_fraction: 0.25}}
objective: cross_entropy
estimator: RandomPerturbation
allocator: {{name: Uniform, directions: 2}}
optimizer: {{name: SGD, lr: 0.01}}
trainer: {{batch_size: 4, steps: 2}}
""",
        "utf-8",
    )
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "r.yaml"), f"output.dir={run}", "--quiet"]) == 0
    assert (run / "model" / "adapter" / "adapter_model.safetensors").is_file()
    assert main(["eval", str(run)]) == 0


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    with pytest.raises(MissingError, match=r"there is no .*adapter_config.json; give the file"):
        transformers(TEXT, folder, peft=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="exclude each other"):
        transformers(TEXT, folder, lora=2, peft=written(tmp_path, "IA3", {}))
    made = written(tmp_path, "P_TUNING", {"num_virtual_tokens": 2, "encoder_hidden_size": 4})
    with pytest.raises(UsageError, match="choose PROMPT_TUNING or PREFIX_TUNING"):
        transformers(TEXT, folder, peft=made)
    unknown = written(tmp_path, "NOSUCH", {})
    with pytest.raises(UsageError, match=r"adapter_config.json \(NOSUCH\) cannot be used"):
        transformers(TEXT, folder, peft=unknown)
    prompt = written(tmp_path, "PROMPT_TUNING", {"num_virtual_tokens": 2})
    with pytest.raises(UsageError, match="change how many tokens"):
        transformers(TEXT, folder, head="mean", peft=prompt)


def test_without_the_library(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError("no module named peft")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingError, match=r'pip install "peft.*lora=RANK'):
        transformers(TEXT, folder, peft=str(tmp_path))
