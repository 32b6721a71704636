"""The ledger: what comes back, and that nothing else does."""

from __future__ import annotations

import random
from hashlib import blake2b
from pathlib import Path

import pytest
import torch

from fwdlearn.errors import StorageError
from fwdlearn.ledger.records import Ledger, LedgerWriter, Record, same
from tests.ledger.mutations import mutate

HEADER = {"format": 1, "weights": {"w": "00"}, "recipe": {"seed": 0}}


def _record(step: int) -> Record:
    kinds = (None, torch.randn(step % 5), torch.randn(3, dtype=torch.float64))
    return Record(step, 8, step % 2, 0.5 / step, float("nan"), step % 3 == 1, kinds[step % 3])


def _written(path: Path, steps: int = 12) -> list[Record]:
    torch.manual_seed(0)
    records = [_record(step) for step in range(1, steps + 1)]
    writer = LedgerWriter.create(path, HEADER)
    for record in records:
        writer.append(record.body())
    writer.close()
    return records


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    records = _written(tmp_path / "ledger.bin")
    ledger = Ledger(tmp_path / "ledger.bin")
    assert ledger.header == HEADER and ledger.steps == 12 and not ledger.torn
    assert all(same(one, other) for one, other in zip(records, ledger, strict=True))
    assert ledger.end == (tmp_path / "ledger.bin").stat().st_size


def test_sixty_bytes_a_step(tmp_path: Path) -> None:
    writer = LedgerWriter.create(tmp_path / "ledger.bin", HEADER)
    begin = writer.end
    writer.append(Record(1, 8, 0, 1.0, 1.0, True, torch.zeros(10)).body())
    assert writer.end - begin == 60 + 4 * 10


def test_writing_goes_on_after_a_record_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "ledger.bin"
    _written(path)
    whole = path.read_bytes()
    ends = [Ledger(path).end_of(step) for step in (10, 11)]
    for cut in range(ends[0] + 1, ends[1]):
        path.write_bytes(whole[:cut])
        ledger = Ledger(path)
        assert (ledger.steps, ledger.torn) == (10, cut - ends[0])
        writer = LedgerWriter(path, ledger.end, ledger.hash(10))
        torch.manual_seed(0)
        for record in [_record(step) for step in range(1, 13)][10:]:
            writer.append(record.body())
        writer.close()
        assert path.read_bytes() == whole


def test_damage_names_the_step_and_what_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "ledger.bin"
    _written(path)
    whole, ledger = path.read_bytes(), Ledger(path)
    end = ledger.end_of(4)
    path.write_bytes(whole[: end + 3] + b"\xff" + whole[end + 4 :])
    with pytest.raises(StorageError, match=f"step 5, at byte {end}, is damaged; .* cut .* {end} b"):
        Ledger(path)
    path.write_bytes(whole[:end] + whole[ledger.end_of(5) :])
    with pytest.raises(StorageError, match="does not follow the one before it"):
        Ledger(path)


def _headed(text: bytes) -> bytes:
    begin = b"FWDLEDG1" + len(text).to_bytes(4, "little") + text
    return begin + blake2b(begin, digest_size=16).digest()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04", "is no ledger, or one of another version"),
        (b"FWDLEDG1", "cut short"),
        (b"FWDLEDG1\xff\xff\xff\xff", "says that it has 4294967295 bytes"),
        (b"FWDLEDG1\x02\x00\x00\x00{}" + bytes(16), "header is damaged"),
        (_headed(b"{x"), "the header is no JSON"),
        (_headed(b"[" * 10**5), "the header is no JSON"),
        (_headed(b"[]"), "the header is list, not keys and values"),
    ],
)
def test_headers_that_are_none(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "ledger.bin").write_bytes(data)
    with pytest.raises(StorageError, match=message):
        Ledger(tmp_path / "ledger.bin")


def test_a_system_that_lost_its_power_leaves_zeros(tmp_path: Path) -> None:
    path = tmp_path / "ledger.bin"
    _written(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(200))
    assert (Ledger(path).steps, Ledger(path).torn) == (12, 200)


def _survive(path: Path, count: int, seed: int) -> int:
    """Mutates; returns how many were rejected. A ledger that is read holds a beginning of it."""
    records, rejected = _written(path), 0
    whole, sound = path.read_bytes(), Ledger(path)
    cuts = [sound.end_of(step) for step in range(sound.steps + 1)]
    chance = random.Random(seed)
    for number in range(count):
        path.write_bytes(mutate(whole, chance, cuts))
        try:
            ledger = Ledger(path)
        except StorageError:
            rejected += 1
            continue
        assert ledger.header == HEADER
        assert ledger.steps <= len(records), f"mutation {number} of seed {seed}"
        for one, other in zip(ledger, records, strict=False):
            assert same(one, other), f"mutation {number} of seed {seed}"
    return rejected


def test_mutations_are_rejected_or_leave_a_beginning(tmp_path: Path) -> None:
    assert _survive(tmp_path / "ledger.bin", 400, seed=0) > 250


# Ten thousand files.
@pytest.mark.slow
def test_ten_thousand_mutations(tmp_path: Path) -> None:
    assert _survive(tmp_path / "ledger.bin", 10_000, seed=1) > 6_000
