"""A ViT of transformers: pretrained, tuned by the recipe, exported, loaded offline."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from fwdlearn.baselines.pretrain_images import pretrain_images
from fwdlearn.cli import main
from fwdlearn.data import idx
from fwdlearn.errors import UsageError
from fwdlearn.models import transformers

library = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of four classes, each bright in a quarter of its own."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("train", 80), ("t10k", 24)):
        labels = torch.arange(rows) % 4
        pixels = torch.randint(0, 60, (rows, 8, 8), generator=generator, dtype=torch.uint8)
        for row, label in enumerate(labels.tolist()):
            top, left = 4 * (label // 2), 4 * (label % 2)
            pixels[row, top : top + 4, left : left + 4] += 150
        with gzip.open(folder / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">4I", 2051, rows, 8, 8) + pixels.numpy().tobytes())
        with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">2I", 2049, rows) + labels.to(torch.uint8).numpy().tobytes())
    return folder


def test_other_classes_are_learned_and_the_export_loads_offline(
    images: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    sizes = {"patch": 4, "width": 8, "layers": 1}
    figures = pretrain_images(
        images, tmp_path / "vit", [0, 1], **sizes, steps=60, lr=1e-2, tell=told.append
    )
    assert figures["accuracy"] > 0.9 and len(told) == 10
    words = [
        *("train", "vit-transfer", f"data.path={images}", f"model.path={tmp_path / 'vit'}"),
        *("data.classes=[2, 3]", "data.train_rows=40", "trainer.steps=12", "optimizer.lr=0.01"),
        *("trainer.batch_size=8", "allocator.directions=2", "trainer.evaluate_every=6"),
        *(f"output.dir={tmp_path / 'run'}", "--quiet"),
    ]
    assert main(words) == 0
    data = idx(images, classes=[2, 3])
    again = transformers(data.info, tmp_path / "run" / "model")
    plain = library.AutoModelForImageClassification.from_pretrained(
        tmp_path / "run" / "model", local_files_only=True
    ).eval()
    assert data.evaluation is not None
    batch = data.prepared(again.processor).train.batch(torch.arange(4))
    with torch.inference_mode():
        assert torch.equal(plain(**batch.kwargs).logits, again.module(**batch.kwargs).logits)


def test_refusals(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        pretrain_images(images, tmp_path)
    with pytest.raises(UsageError, match="patch divide their side"):
        pretrain_images(images, tmp_path / "new", patch=3)
    with pytest.raises(UsageError, match="has its own"):
        pretrain_images(tmp_path, tmp_path / "new", [0, 1])
