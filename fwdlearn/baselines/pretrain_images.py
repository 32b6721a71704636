"""A small vision transformer of some images, trained by backpropagation: something to start from.

    python -m fwdlearn.baselines.pretrain_images DATA FOLDER [--classes 0,1,2,3,4]

DATA is a folder of IDX files, or one with a folder for each class (see `image_folder`). FOLDER gets
a ViT of transformers and the configuration of its images, for `model: {name: transformers,
path: FOLDER}`. The recipe vit-transfer teaches it other classes, forward-only. With the sizes that
it has when nothing is said it takes a minute of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fwdlearn.baselines.pretrain import descend
from fwdlearn.data.idx import idx
from fwdlearn.data.image_folder import image_folder
from fwdlearn.data.types import Data, DataInfo
from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.keys import Key
from fwdlearn.metrics import Scores
from fwdlearn.models.built import weights_from
from fwdlearn.models.transformers import quiet, transformers
from fwdlearn.objectives import cross_entropy


def write_untrained(
    folder: Path, info: DataInfo, patch: int, width: int, layers: int, seed: int = 0
) -> None:
    """A ViT with first weights, and what its images are to be like, as `save_pretrained` does it.

    Args:
        folder: where.
        info: of images.
        patch: pixels of a side of a patch; divides the height and the width.
        width: of a token's state, a multiple of 8.
        layers: at least 1.
        seed: of the weights.

    Raises:
        UsageError: a size is out of range.
    """
    channels, height, side = info.shape
    if height != side or side % patch or width < 8 or width % 8 or layers < 1:
        raise UsageError(
            f"images must be square and patch divide their side, width a multiple of 8 and layers "
            f"at least 1; got {height} x {side}, {patch}, {width} and {layers}."
        )
    import transformers as library

    config = library.ViTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 8,
        image_size=side,
        patch_size=patch,
        num_channels=channels,
    )
    config.num_labels = info.outputs
    with quiet(library), weights_from(seed):
        library.ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
        "size": {"height": side, "width": side},
    }
    text = json.dumps(processor, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, "utf-8")


def pretrain_images(
    path: Path,
    folder: Path,
    classes: Sequence[int] | None = None,
    patch: int = 7,
    width: int = 32,
    layers: int = 2,
    steps: int = 600,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    tell: Callable[[str], None] = print,
) -> dict[str, float]:
    """Trains a model of images and writes its folder.

    Args:
        path: the images.
        folder: a new one.
        classes: of IDX files, numbers of those to learn; None for all.
        patch, width, layers: see `write_untrained`.
        steps, batch_size, lr: of Adam, whose rate falls to nothing along half a cosine.
        seed: of the weights and the order of rows.
        tell: told how far it is.

    Returns:
        Figures of the evaluation rows; empty where there are none.

    Raises:
        UsageError: the folder is there already, or an argument is out of range.
    """
    if folder.exists():
        raise UsageError(f"{folder} is there already; choose another name.")
    data = _images(path, classes)
    write_untrained(folder, data.info, patch, width, layers, seed)
    built = transformers(data.info, folder)
    data = data.prepared(built.processor)
    descend(built.module, data.train, steps, batch_size, lr, Key.root(seed), tell)
    assert built.save is not None
    built.save(folder)
    if data.evaluation is None:
        return {}
    scores = Scores()
    with torch.inference_mode():
        for index in torch.arange(len(data.evaluation)).split(256):
            batch = data.evaluation.batch(index)
            output = built.module(**batch.kwargs)
            scores.add(cross_entropy(output, batch.targets), output, batch.targets)
    return scores.result()


def _images(path: Path, classes: Sequence[int] | None) -> Data:
    if any(path.glob("train-images-idx3-ubyte*")):
        return idx(path, classes=classes, evaluation_rows=2000)
    if classes is not None:
        raise UsageError("classes are numbers of IDX files; a folder of images has its own.")
    return image_folder(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fwdlearn.baselines.pretrain_images")
    parser.add_argument("data", type=Path, help="a folder of IDX files, or of class folders")
    parser.add_argument("folder", type=Path, help="for the model; must not be there yet")
    parser.add_argument("--classes", help="of IDX files, such as 0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    try:
        classes = None if asked.classes is None else [int(one) for one in asked.classes.split(",")]
    except ValueError:
        parser.error(f"--classes takes numbers with commas between them, got {asked.classes!r}")
    try:
        figures = pretrain_images(
            asked.data, asked.folder, classes, steps=asked.steps, seed=asked.seed
        )
    except FwdlearnError as error:
        sys.exit(f"error: {error}")
    print(" ".join(f"{name} {value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
