"""The run's folder: what may be replaced, and writes that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fwdlearn.errors import MissingError, StorageError, UsageError
from fwdlearn.recipe.folder import RunFolder, status
from fwdlearn.recipe.weights import load_model, save_model


def _run(path: Path, state: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "resolved.yaml").write_text("seed: 0\n")
    (path / "summary.json").write_text(json.dumps({"status": state}))
    (path / "metrics.jsonl").write_text("{}\n")
    (path / "model").mkdir()
    (path / "notes.txt").write_text("mine")


def test_the_next_free_folder(tmp_path: Path) -> None:
    names = [RunFolder.next_free(tmp_path / "a").path.name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="is not empty and holds no run .it has thesis.tex"):
        RunFolder.named(tmp_path, overwrite=False)
    RunFolder.named(tmp_path, overwrite=True).close()
    assert (tmp_path / "thesis.tex").exists()


def test_a_finished_run_is_kept_unless_asked(tmp_path: Path) -> None:
    _run(tmp_path, "finished")
    RunFolder.named(tmp_path, overwrite=False).close()
    assert (tmp_path / "metrics.jsonl").exists()
    RunFolder.named(tmp_path, overwrite=True).close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize("state", ["failed", "interrupted", "running"])
def test_an_unfinished_run_is_replaced_where_nothing_continues_it(
    tmp_path: Path, state: str
) -> None:
    _run(tmp_path, state)
    (tmp_path / "ledger.bin").write_bytes(b"")
    RunFolder.named(tmp_path, overwrite=False).close()
    assert status(tmp_path) == state
    (tmp_path / "ledger.bin").unlink()
    RunFolder.named(tmp_path, overwrite=False).close()
    assert status(tmp_path) is None


def test_what_a_crash_left_is_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / ".resolved.yaml.partial").write_text("se")
    (tmp_path / ".model.partial").mkdir()
    RunFolder.named(tmp_path, overwrite=False).close()
    assert not list(tmp_path.iterdir())


def test_one_run_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first = RunFolder.named(tmp_path, overwrite=False)
    with pytest.raises(UsageError, match="another run is writing to"):
        RunFolder.named(tmp_path, overwrite=True)
    first.close()
    RunFolder.named(tmp_path, overwrite=False).close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: Not a directory"):
        RunFolder.named(tmp_path / "file" / "run", overwrite=False)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.named(tmp_path, overwrite=False)
    folder.write_json("summary.json", {"status": "running", "loss": float("nan")})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "status": "running",
        "loss": None,
    }

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        folder.write_json("summary.json", {"status": "finished"})
    assert status(tmp_path) == "running"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        whole = torch.arange(6.0)
        self.register_buffer("front", whole[:3])
        self.register_buffer("rest", whole[2:])


def test_tied_and_overlapping_tensors_survive(tmp_path: Path) -> None:
    module, other = _Tied(), _Tied()
    module.front[0] = 7.0
    save_model(module, tmp_path / "model", {"name": "tied"})
    load_model(other, tmp_path / "model")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.head.weight is other.embedding.weight
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    digests = description.pop("digests")
    assert description == {"name": "tied", "tied": {"head.weight": "embedding.weight"}}
    assert digests.keys() == {"embedding.weight", "front", "rest"}


def test_weights_that_do_not_fit_or_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="holds no weights"):
        load_model(nn.Linear(2, 2), tmp_path)
    save_model(nn.Linear(2, 2), tmp_path / "model", {})
    with pytest.raises(StorageError, match="the weights cannot be used: .*size mismatch"):
        load_model(nn.Linear(3, 2), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(StorageError, match="the weights cannot be used"):
        load_model(nn.Linear(2, 2), tmp_path / "model")


def test_weights_with_a_flipped_bit_are_refused(tmp_path: Path) -> None:
    save_model(nn.Linear(2, 2), tmp_path / "model", {})
    path = tmp_path / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="(weight|bias) is not as it was written"):
        load_model(nn.Linear(2, 2), tmp_path / "model")
