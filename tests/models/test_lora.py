"""Low-rank adapters: what they add, what is trained, what is saved, what PEFT makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fwdlearn.batch import Batch
from fwdlearn.cli import main
from fwdlearn.data import DataInfo
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.models import Built, transformers
from fwdlearn.models.lora import Adapted, adapt, adapters, folded_state
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import forbid_backward

library = pytest.importorskip("transformers")

TEXT = DataInfo("text", (), 3)
WORDS = {
    "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BERT with its tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmno"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words), "utf-8")
    config = library.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        library.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer = library.BertTokenizerFast(str(tmp_path / "bert" / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def moved(built: Built) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in built.module.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.3)


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        output = module(**WORDS)
    return output if isinstance(output, torch.Tensor) else output.logits


def test_it_adds_a_product_that_is_zero_at_first() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Linear(6, 4)
        made = Adapted(plain, 2, 4.0)
    x = torch.ones(3, 6)
    torch.testing.assert_close(made(x), plain(x))
    with torch.no_grad():
        made.lora_B.fill_(0.5)
        wanted = plain(x) + 2.0 * x @ (made.lora_B @ made.lora_A).T
        torch.testing.assert_close(made(x), wanted)
        torch.testing.assert_close(x @ made.folded().T + made.bias, wanted)


@pytest.mark.parametrize("head", ["mean", "auto"])
def test_adapters_and_head_are_trained(folder: Path, head: str) -> None:
    built = transformers(TEXT, folder, head=head, lora=2, lora_on=("*query", "*value"))
    trained = {name for name, value in built.module.named_parameters() if value.requires_grad}
    thin = {name for name in trained if "lora" in name}
    assert trained - thin == {"classifier.weight", "classifier.bias"} and len(thin) == 2 * 2 * 2
    assert all("query" in name or "value" in name for name in thin)
    with forbid_backward():
        batch = Batch((), torch.tensor([0, 1]), WORDS)
        assert Engine(built.module, cross_entropy).choose(batch).rung == "fold"


@pytest.mark.parametrize("head", ["mean", "auto"])
def test_what_is_saved_needs_no_adapter(folder: Path, head: str, tmp_path: Path) -> None:
    built = transformers(TEXT, folder, head=head, lora=2)
    assert built.save is not None
    before = logits(built.module)
    moved(built)
    wanted = logits(built.module)
    assert (wanted - before).abs().max() > 1e-2
    built.save(tmp_path / "out")
    again = transformers(TEXT, tmp_path / "out", head=head)
    assert not adapters(again.module)
    torch.testing.assert_close(logits(again.module), wanted, atol=1e-5, rtol=1e-5)
    # And the model in hand is as it was.
    torch.testing.assert_close(logits(built.module), wanted)


@pytest.mark.parametrize("head", ["mean", "auto"])
def test_the_adapter_alone_does_the_same(folder: Path, head: str, tmp_path: Path) -> None:
    built = transformers(TEXT, folder, head=head, lora=2)
    moved(built)
    assert built.save is not None
    built.save(tmp_path / "out")
    place = tmp_path / "out" / "adapter"
    config = json.loads((place / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(place / "adapter_model.safetensors")
    assert config["r"] == 2 and config["lora_alpha"] == 4
    inner = built.module.encoder if head == "mean" else built.module
    base = library.AutoModel if head == "mean" else library.AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        plain = base.from_pretrained(folder, num_labels=3)
    state = plain.state_dict()
    for name in config["target_modules"]:
        up, down = (tensors[f"base_model.model.{name}.lora_{one}.weight"] for one in "BA")
        state[f"{name}.weight"] = state[f"{name}.weight"] + 2.0 * up @ down
    for name, value in folded_state(inner).items():  # type: ignore[arg-type]
        if name.startswith("classifier"):
            torch.testing.assert_close(tensors[f"base_model.model.{name}"], value)
        elif "pooler" not in name or head == "auto":
            torch.testing.assert_close(state[name], value)


def test_peft_loads_it(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    built = transformers(TEXT, folder, lora=2)
    moved(built)
    assert built.save is not None
    built.save(tmp_path / "out")
    with torch.random.fork_rng(devices=[]):
        plain = library.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(built.module), atol=1e-5, rtol=1e-5)


RECIPE = """\
model: {{name: transformers, path: "{folder}/bert", head: {head}, lora: 2}}
data: {{name: jsonl, path: "{folder}"}}
estimator: {{name: RandomPerturbation, sigma: 0.01}}
allocator: {{name: Uniform, directions: 4, sharing: shared}}
optimizer: {{name: Adam, lr: 0.05}}
trainer: {{batch_size: 4, steps: 6}}
"""


@pytest.mark.parametrize("head", ["mean", "auto"])
def test_a_run_is_exported_as_model_adapter_and_ledger(
    folder: Path, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": text, "label": label}) for text, label in (("a b", 0), ("d e", 1))]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows * 4))
    (tmp_path / "r.yaml").write_text(RECIPE.format(folder=tmp_path, head=head))
    assert main(["train", "r.yaml", "output.dir=run", "--quiet"]) == 0
    for form in ("peft", "transformers", "ledger"):
        assert main(["export", "run", "--format", form, "--out", form]) == 0
    # Not finished, as far as its folder knows: rebuilt from the ledger.
    (tmp_path / "run" / "summary.json").write_text('{"status": "running"}')
    assert main(["export", "run", "--format", "peft", "--out", "again"]) == 0
    assert main(["apply", "bert", "ledger", "--out", "applied"]) == 0
    whole = load_file(tmp_path / "transformers" / "model.safetensors")
    applied = load_file(tmp_path / "applied" / "model.safetensors")
    assert all(torch.equal(value, applied[name]) for name, value in whole.items())
    file = "adapter_model.safetensors"
    adapter = load_file(tmp_path / "peft" / file)
    assert (tmp_path / "peft" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    base = load_file(tmp_path / "bert" / "model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text("utf-8"))
    for name in config["target_modules"]:
        own = name if head == "mean" else name.removeprefix("bert.")
        up, down = (adapter[f"base_model.model.{name}.lora_{one}.weight"] for one in "BA")
        assert up.any()
        moved = base[f"{own}.weight"] + 2.0 * (up @ down)
        assert torch.equal(whole[f"{name}.weight"], moved)
    assert (tmp_path / "peft" / "head.safetensors").exists() == (head == "mean")


def test_refusals(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"'\*keys' matches no linear layer; the first are"):
        transformers(TEXT, folder, lora=2, lora_on=("*keys",))
    with pytest.raises(UsageError, match="a rank of at least 1, got 0"):
        transformers(TEXT, folder, lora=0)
    with pytest.raises(UsageError, match="head='reader' freezes the model"):
        transformers(TEXT, folder, head="reader", lora=2)
    with pytest.raises(UsageError, match="it has no nn.Linear"):
        adapt(nn.Identity(), 1, ("*",))
