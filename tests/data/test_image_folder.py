from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fwdlearn.data import image_folder
from fwdlearn.errors import MissingError, UsageError

Image = pytest.importorskip("PIL.Image")


def draw(folder: Path, classes: dict[str, int], size: tuple[int, int] = (6, 4)) -> Path:
    """Images of one colour, `classes` many of each, (width, height) `size`."""
    for shade, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            color = (255 * shade, i, 0)
            Image.new("RGB", size, color).save(folder / name / f"{i}.png")
    return folder


def test_train_and_validation(tmp_path: Path) -> None:
    draw(tmp_path / "train", {"cat": 3, "dog": 2})
    draw(tmp_path / "val", {"cat": 1, "dog": 1})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = image_folder(tmp_path)
    assert (data.info.shape, data.info.labels) == ((3, 4, 6), ("cat", "dog"))
    assert data.evaluation is not None and (len(data.train), len(data.evaluation)) == (5, 2)
    batch = data.train.batch(torch.tensor([4, 1]))
    assert batch.targets.tolist() == [1, 0]
    pixel = batch.args[0][:, :, 0, 0]
    assert torch.allclose(pixel, torch.tensor([[1, 1 / 255, 0], [0, 1 / 255, 0]]))


def test_on_disk_equals_in_memory(tmp_path: Path) -> None:
    draw(tmp_path, {"cat": 3, "dog": 3})
    index = torch.tensor([5, 0, 2])
    memory = image_folder(tmp_path, size=[3, 3]).train.batch(index)
    disk = image_folder(tmp_path, size=[3, 3], in_memory=False).train.batch(index)
    assert torch.equal(memory.args[0], disk.args[0])
    assert torch.equal(memory.targets, disk.targets)


def test_split_size_and_grey(tmp_path: Path) -> None:
    draw(tmp_path, {"cat": 10, "dog": 10})
    data = image_folder(tmp_path, evaluation_fraction=0.2, size=8, mode="L")
    assert data.evaluation is not None and (len(data.train), len(data.evaluation)) == (16, 4)
    assert data.info.shape == (1, 8, 8)
    other = image_folder(tmp_path, evaluation_path=tmp_path, size=8)
    assert other.evaluation is not None and len(other.evaluation) == 20


@pytest.mark.parametrize("in_memory", [True, False])
def test_sizes_must_agree(tmp_path: Path, in_memory: bool) -> None:
    draw(tmp_path, {"cat": 1, "dog": 1})
    Image.new("RGB", (9, 9)).save(tmp_path / "dog" / "9.png")
    with pytest.raises(UsageError, match="9.png: the image is 9 x 9, the first one is 4 x 6; give"):
        image_folder(tmp_path, in_memory=in_memory).train.batch(torch.arange(3))


def test_broken_images(tmp_path: Path) -> None:
    draw(tmp_path, {"cat": 1, "dog": 1})
    whole = (tmp_path / "dog" / "0.png").read_bytes()
    for content in (b"", b"words", whole[:40], whole[:50]):
        (tmp_path / "dog" / "0.png").write_bytes(content)
        with pytest.raises(UsageError, match="0.png: not a readable image .*remove the file or"):
            image_folder(tmp_path)


def test_layout_errors(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"image_folder\(path=...\): there is no"):
        image_folder(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no class folders; images belong in one folder a"):
        image_folder(tmp_path)
    draw(tmp_path, {"cat": 1})
    with pytest.raises(UsageError, match="every training row has the label 'cat'"):
        image_folder(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UsageError, match="dog: the class folder holds no images"):
        image_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; it must be a folder of class folders"):
        image_folder(tmp_path / "file")


def test_unknown_class_in_evaluation(tmp_path: Path) -> None:
    draw(tmp_path / "train", {"cat": 1, "dog": 1})
    draw(tmp_path / "test", {"cats": 1})
    with pytest.raises(UsageError, match="0.png: the label 'cats' does not .* nearest is 'cat'"):
        image_folder(tmp_path)


def test_arguments(tmp_path: Path) -> None:
    draw(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(UsageError, match=r"image_folder\(size=...\) must be a height and a width"):
        image_folder(tmp_path, size=0)
    with pytest.raises(UsageError, match=r"image_folder\(mode=...\) must be RGB or L, got 'X'"):
        image_folder(tmp_path, mode="X")  # type: ignore[arg-type]


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingError, match=r'pip install "fwdlearn\[data\]"'):
        image_folder(tmp_path)
