"""Snapshots: every byte counts, the newest sound one is found, the last one never goes."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.errors import StorageError
from fwdlearn.ledger import snapshots
from fwdlearn.ledger.snapshots import Snapshot
from fwdlearn.ledger.trees import pack, unpack
from tests.ledger.mutations import mutate


def _snapshot() -> Snapshot:
    torch.manual_seed(0)
    tensors = {
        "weights/a": torch.randn(3, 5),
        "weights/b": torch.randn(4).bfloat16(),
        "count": torch.tensor(7),
        "none": torch.empty(0, 2),
        "mask": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 3).T,
    }
    return Snapshot({"step": 3, "tree": {"x": [1, None, "é"]}}, tensors)


def _equal(one: Snapshot, other: Snapshot) -> bool:
    return one.meta == other.meta and all(
        torch.equal(value, other.tensors[name]) and value.dtype == other.tensors[name].dtype
        for name, value in one.tensors.items()
    )


def test_what_was_written_comes_back_and_is_safetensors(tmp_path: Path) -> None:
    path, snapshot = tmp_path / "s.safetensors", _snapshot()
    snapshots.write(path, snapshot)
    assert _equal(snapshot, snapshots.read(path))
    assert _equal(snapshot, Snapshot(snapshot.meta, load_file(path)))


def test_every_single_bit_counts(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    snapshots.write(path, Snapshot({"step": 1}, {"a": torch.arange(3.0)}))
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StorageError, match="is damaged"):
            snapshots.read(path)


def _survive(path: Path, count: int, seed: int) -> None:
    snapshot = _snapshot()
    snapshots.write(path, snapshot)
    whole, chance = path.read_bytes(), random.Random(seed)
    begin = 8 + int.from_bytes(whole[:8], "little")
    cuts = [0, 8, begin, begin + 60, begin + 68, len(whole)]
    for number in range(count):
        changed = mutate(whole, chance, cuts)
        path.write_bytes(changed)
        try:
            found = snapshots.read(path)
        except StorageError:
            continue
        assert changed == whole and _equal(snapshot, found), f"mutation {number} of seed {seed}"


def test_mutations_are_rejected(tmp_path: Path) -> None:
    _survive(tmp_path / "s.safetensors", 400, seed=0)


# Ten thousand files.
@pytest.mark.slow
def test_ten_thousand_mutations(tmp_path: Path) -> None:
    _survive(tmp_path / "s.safetensors", 10_000, seed=1)


def test_the_newest_sound_one_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        snapshots.store(tmp_path, step, Snapshot({"step": step}, {}))
    assert [step for step, _ in snapshots.in_folder(tmp_path)] == [3, 2]
    newest = snapshots.in_folder(tmp_path)[0][1]
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "snapshot-9.safetensors").write_text("not one of ours")
    found = list(snapshots.valid(tmp_path))
    assert isinstance(found[0][1], StorageError) and "step" not in str(found[0][1]).split(":")[0]
    assert isinstance(found[1][1], Snapshot) and found[1][1].meta == {"step": 2}


def test_one_that_comes_back_otherwise_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        snapshots.store(tmp_path, step, Snapshot({"step": step}, {}))
    replace = snapshots.replace_file

    def torn(path: Path, write: Any) -> None:
        replace(path, write)
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(snapshots, "replace_file", torn)
    with pytest.raises(StorageError, match="is damaged"):
        snapshots.store(tmp_path, 3, Snapshot({"step": 3}, {}))
    assert [step for step, _ in snapshots.in_folder(tmp_path)] == [3, 2, 1]


@dataclass(frozen=True)
class Inner:
    """Of a state."""

    mean: float
    values: Tensor


def test_states_of_any_shape_come_back() -> None:
    state = {
        "inner": Inner(math.inf, torch.arange(2)),
        0: [None, (True, -0.0, "a/b")],
        "deep": {"x": {}, 1.5: 2**70},
    }
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(pack(state, tensors, "state")))
    back = unpack(packed, tensors, {"tests"})
    assert list(back) == list(state)
    assert back["inner"].mean == math.inf and back["inner"].values is tensors["state/inner/values"]
    assert back[0][:1] == [None] and back[0][1] == (True, 0.0, "a/b")
    assert math.copysign(1, back[0][1][1]) == -1 and back["deep"] == state["deep"]


def test_what_cannot_be_kept_is_named() -> None:
    with pytest.raises(TypeError, match="state/a/1 is set; only tensors, numbers"):
        pack({"a": [1, {2}]}, {}, "state")


@pytest.mark.parametrize(
    "packed",
    [
        {"of": "os:system", "fields": []},
        {"of": "tests.ledger.test_snapshots:pytest", "fields": []},
        {"call": 1},
        {},
        [1],
    ],
)
def test_nothing_else_is_made_of_what_is_read(packed: Any) -> None:
    with pytest.raises(ValueError, match="stands for nothing|is no dataclass of"):
        unpack(packed, {}, {"tests"})


def test_to_look_at_a_file_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    tensors = {str(n): torch.full((1000 + n,), float(n)) for n in range(8)}
    with LiveBytes(torch.device("cpu")) as live:
        path = snapshots.store(tmp_path, 1, Snapshot({}, tensors))
    assert live.peak == 4 * 1007
    made: list[int] = []

    def empty(size: int) -> torch.Tensor:
        made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    found = snapshots.read(path, empty)
    assert made == [4 * (1000 + n) for n in range(8)]
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors.items())


def test_a_tensor_made_of_others_has_the_digest_of_what_lies_inside() -> None:
    """As torchao's quantised tensors are, which cannot be viewed as bytes themselves."""
    codes, scale = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    first, again = (TwoTensor(codes, scale.clone()) for _ in range(2))
    assert snapshots.digest("w", first) == snapshots.digest("w", again)
    again.b[1, 2] = 2
    assert snapshots.digest("w", first) != snapshots.digest("w", again)
    assert snapshots.digest("w", first) != snapshots.digest("v", first)
