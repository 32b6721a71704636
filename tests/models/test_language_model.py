"""Language models: losses and answers are the library's own, on every rung."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.data import DataInfo, completions, corpus, label_words
from fwdlearn.data.language import OptionRows, SaidRows
from fwdlearn.data.passages import TokenSequences
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.estimators import ForwardGradient, LikelihoodRatio, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.models import transformers
from fwdlearn.models.language import Answer, LanguageModel
from fwdlearn.objectives import cross_entropy, score
from fwdlearn.oracle import ModelOracle, forbid_backward
from tests.models.language_models import causal_folder, lines

library = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "intermediate_size": 48, "vocab_size": 60, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60} | ENDS,
    ),
    "OPTForCausalLM": (
        "OPTConfig",
        {**SIZES, "ffn_dim": 48, "vocab_size": 60, "word_embed_proj_dim": 32},
    ),
    "LlamaForCausalLM": ("LlamaConfig", TEXT),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "MistralForCausalLM": ("MistralConfig", GROUPED),
    "GemmaForCausalLM": ("GemmaConfig", {**GROUPED, "head_dim": 8}),
}
# (tokens, those before the first that is asked for) of texts of very different lengths
SHAPES = ((9, 3), (5, 1), (12, 7), (3, 1))


class Tokenizer:
    eos_token_id = 2

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def model(name: str) -> LanguageModel:
    config, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(library, name)(getattr(library, config)(**settings))
    return LanguageModel(made.eval().double(), Tokenizer())


def texts() -> TokenSequences:
    generator = torch.Generator().manual_seed(1)
    return TokenSequences.of(
        [
            (torch.randint(3, 60, (n,), generator=generator).tolist(), [i >= a for i in range(n)])
            for n, a in SHAPES
        ]
    )


def options() -> OptionRows:
    first, counts = torch.tensor([0, 1]), torch.tensor([2, 3])
    return OptionRows(texts(), first, counts, torch.tensor([0, 2]), True, 0, 64)


def digits(prediction: str, target: str) -> float:
    """Of an answer: how it ends, which changes with every token."""
    return sum(map(int, prediction.split())) % 10 / 10


KINDS: dict[str, tuple[Callable[[], Batch], Any]] = {
    "said": (lambda: SaidRows(texts(), 0, 64).batch(torch.arange(4)), cross_entropy),
    "options": (lambda: options().batch(torch.arange(2)), cross_entropy),
    "answers": (
        lambda: SaidRows(texts(), 0, 64, said=False, new_tokens=4).batch(torch.arange(4)),
        partial(score, metric=digits),
    ),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(MODELS))
def test_fold_is_the_sequential_pass(name: str, kind: str) -> None:
    make, objective = KINDS[kind]
    batch, lm = make(), model(name)
    plan, losses = Plan.uniform(len(batch), 3), []
    for rung in ("auto", "sequential"):
        engine = Engine(lm, objective, rung=rung)
        oracle = ModelOracle(engine, batch)
        family = Directions(Key.root(0), oracle.params, plan.directions)
        losses.append(oracle.losses(plan.row, family, plan.direction, 0.03))
        assert oracle.queries == len(plan) * {"said": 1, "options": 3, "answers": 4}[kind]
        if rung == "auto":
            assert engine.choice is not None and engine.choice.rung == "fold", engine.choice
    assert len(losses[0].unique()) > 4
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", list(MODELS))
def test_losses_are_those_of_each_text_alone(name: str) -> None:
    lm, rows = model(name), texts()
    batch = SaidRows(rows, 0, 64).batch(torch.arange(4))
    found = cross_entropy(lm(**batch.kwargs), batch.targets)
    for i, (n, before) in enumerate(SHAPES):
        ids = rows.tokens[rows.start[i] : rows.start[i] + n].long().unsqueeze(0)
        labels = torch.where(torch.arange(n) < before, -100, ids)
        wanted = lm.model(input_ids=ids, labels=labels).loss
        torch.testing.assert_close(found[i], wanted, check_dtype=False)


@pytest.mark.parametrize("name", list(MODELS))
def test_answers_are_those_of_generate(name: str) -> None:
    lm, rows = model(name), texts()
    batch = SaidRows(rows, 0, 64, said=False, new_tokens=5).batch(torch.arange(4))
    answer = lm(**batch.kwargs)
    assert isinstance(answer, Answer) and answer.logits is None
    for i, (_, before) in enumerate(SHAPES):
        prompt = rows.tokens[rows.start[i] : rows.start[i] + before].long().unsqueeze(0)
        made = lm.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer.tokens[i].tolist() == made[0, before:].tolist()


def test_what_is_not_asked_for_never_has_logits() -> None:
    lm, seen = model("LlamaForCausalLM"), list[tuple[int, ...]]()
    head = lm.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    lm(**SaidRows(texts(), 0, 64, multiple=1).batch(torch.tensor([0, 2])).kwargs)
    assert seen == [(2, 6, 60)]  # of 11 tokens that are read
    lm(**SaidRows(texts(), 0, 64, said=False, new_tokens=3).batch(torch.tensor([0, 2])).kwargs)
    assert seen[1:] == [(2, 1, 60)] * 3


def test_options_are_compared_by_their_log_probabilities() -> None:
    lm, rows = model("LlamaForCausalLM"), texts()
    batch = options().batch(torch.arange(2))
    found = lm(**batch.kwargs)
    assert found.shape == (2, 3) and found[0, 2] == float("-inf")
    said = SaidRows(rows, 0, 64).batch(torch.arange(4))
    means = -cross_entropy(lm(**said.kwargs), said.targets)
    torch.testing.assert_close(torch.cat((found[0, :1], found[1])), means, check_dtype=False)


@pytest.mark.parametrize("estimator", [RandomPerturbation(), ForwardGradient(), LikelihoodRatio()])
def test_estimators_run_on_a_language_model(estimator: Any) -> None:
    lm, batch = model("LlamaForCausalLM"), SaidRows(texts(), 0, 64).batch(torch.arange(4))
    with forbid_backward():
        oracle = ModelOracle(Engine(lm, cross_entropy), batch)
        plan = Plan.uniform(4, 2)
        state = estimator.init(oracle.params)
        made, _ = estimator.estimate(oracle, oracle.params, state, key=Key.root(0), plan=plan)
        norms = [float(made.grad[name].norm()) for name in oracle.params]
    assert all(norm < float("inf") for norm in norms) and any(norms)


def test_masked_models_choose_a_word_at_the_mask(tmp_path: Path) -> None:
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] it was a good bad film . two hours".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    tokenizer = library.BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=32)
    config = library.BertConfig(**{**TEXT, "vocab_size": len(words)}, max_position_embeddings=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        library.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = ({"text": "a film", "label": 1}, {"text": "a bad film . two hours", "label": 0})
    data = label_words(
        lines(tmp_path / "a.jsonl", *rows), ("bad", "good"), "{text} it was {label} ."
    )
    built = transformers(data.info, tmp_path / "bert", head="masked")
    batch = data.prepared(built.processor).train.batch(torch.arange(2))
    plain = library.BertForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    with torch.no_grad():
        found = built.module(**batch.kwargs)
        for i, row in enumerate(rows):
            read = tokenizer(f"{row['text']} it was [MASK] .", return_tensors="pt")
            place = read["input_ids"][0].tolist().index(tokenizer.mask_token_id)
            wanted = plain(**read).logits[0, place][[words.index("bad"), words.index("good")]]
            torch.testing.assert_close(found[i], wanted)
    with forbid_backward():
        assert Engine(built.module, cross_entropy).choose(batch).rung == "fold"
    with pytest.raises(UsageError, match="a mask stands for one token, and 'wonderful'"):
        label_words(tmp_path / "a.jsonl", ("bad", "wonderful")).prepared(built.processor)


def test_what_is_saved_loads_with_identical_logits(tmp_path: Path) -> None:
    causal_folder(tmp_path / "m")
    (tmp_path / "t.txt").write_text("It was great. " * 20, "utf-8")
    data = corpus(tmp_path / "t.txt", tokens=9)
    built = transformers(data.info, tmp_path / "m")
    with torch.no_grad():
        for value in built.module.parameters():
            value.add_(0.1 * torch.ones_like(value))
    assert built.save is not None
    built.save(tmp_path / "out")
    loaded = library.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    batch = data.prepared(built.processor).train.batch(torch.arange(2))
    ids = batch.kwargs["input_ids"]
    with torch.no_grad():
        theirs = loaded.eval()(input_ids=ids, attention_mask=batch.kwargs["attention_mask"]).logits
        ours = built.module(**batch.kwargs)
    assert torch.equal(ours, theirs.gather(1, batch.kwargs["places"].unsqueeze(-1).expand_as(ours)))
    read = library.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (
        read("It was great.")["input_ids"]
        == built.processor.tokenizer("It was great.")["input_ids"]
    )  # type: ignore[union-attr]


def test_an_untied_head_gets_its_exact_gradient_and_is_saved(tmp_path: Path) -> None:
    causal_folder(tmp_path / "m")
    (tmp_path / "t.txt").write_text("It was great. Or terrible, or both? " * 20, "utf-8")
    data = corpus(tmp_path / "t.txt", tokens=33)
    head = "model.lm_head.weight"
    built = transformers(data.info, tmp_path / "m", untie=True, train=(head,))
    tied = transformers(data.info, tmp_path / "m").module
    batch = data.prepared(built.processor).train.batch(torch.arange(2))
    assert torch.equal(built.module(**batch.kwargs), tied(**batch.kwargs))
    with forbid_backward():
        oracle = ModelOracle(Engine(built.module, cross_entropy), batch)
        # 32 tokens of 360: far more numbers than forward derivatives could be taken of.
        estimate, _ = LikelihoodRatio().estimate(
            oracle,
            oracle.params,
            LikelihoodRatio().init(oracle.params),
            key=Key.root(0),
            plan=Plan.uniform(2, 1),
        )
    assert estimate.queries == 2
    cross_entropy(built.module(**batch.kwargs), batch.targets).mean().backward()
    own = built.module.get_parameter(head)
    torch.testing.assert_close(estimate.grad[head], own.grad, rtol=1e-4, atol=1e-6)
    assert own.grad is not None and float(own.grad.norm()) > 0.01
    with torch.no_grad():
        own.sub_(own.grad)
    assert built.save is not None
    built.save(tmp_path / "out")
    loaded = transformers(data.info, tmp_path / "out").module
    assert torch.equal(loaded(**batch.kwargs), built.module(**batch.kwargs))
    assert not torch.equal(loaded(**batch.kwargs), tied(**batch.kwargs))
    with pytest.raises(UsageError, match="untie=true.* is for language models, and data of kind"):
        transformers(DataInfo("text", (), 2), tmp_path / "m", untie=True)


def test_adapters_alone_are_trained(tmp_path: Path) -> None:
    causal_folder(tmp_path / "m")
    file = lines(tmp_path / "a.jsonl", {"prompt": "it was", "completion": " great"})
    data = completions(file)
    built = transformers(data.info, tmp_path / "m", lora=2, lora_on=("*q_proj", "*v_proj"))
    trained = [name for name, value in built.module.named_parameters() if value.requires_grad]
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    assert built.save is not None
    built.save(tmp_path / "out")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    library.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)


def test_heads_and_data_must_fit(tmp_path: Path) -> None:
    causal_folder(tmp_path / "m")
    with pytest.raises(UsageError, match="does not say words, and the data ask for some"):
        transformers(DataInfo("language", (), None), tmp_path / "m", head="mean")
    with pytest.raises(UsageError, match="is a language model, and the data, of kind text"):
        transformers(DataInfo("text", (), 2), tmp_path / "m", head="causal")
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(UsageError, match="no layer that makes logits over a vocabulary"),
    ):
        LanguageModel(library.BertModel(library.BertConfig(**TEXT)), None)


def test_metrics_see_texts(tmp_path: Path) -> None:
    causal_folder(tmp_path / "m")
    file = lines(tmp_path / "a.jsonl", {"prompt": "it was", "completion": " great"})
    data = completions(file, new_tokens=3, train_on="answers")
    built = transformers(data.info, tmp_path / "m")
    batch = data.prepared(built.processor).train.batch(torch.arange(1))
    answer, seen = built.module(**batch.kwargs), list[tuple[str, str]]()

    def metric(prediction: str, target: str) -> float:
        seen.append((prediction, target))
        return 2.0

    losses: Tensor = score(answer, batch.targets, metric)
    assert losses.tolist() == [-2.0] and seen[0][1] == " great" and isinstance(seen[0][0], str)
