"""The ledger: a file that grows by one record a step.

    file    = "FWDLEDG1" length:u32 header hash_0        header: canonical JSON, at most 64 MB
    record  = step:u64 count:u32 queries:u32 nonfinite:u32 loss:f64 variance:f64
              kind:u8 flags:u8 spare:u16 crc:u32          of what stands before it in the record
              length:u32 entries                          of tables, if they are listed
              coefficients, `count` of them               kind 0 none, 1 float32, 2 float64
              hash_n                                      BLAKE2b-128 of hash_{n-1} and the record

Little-endian; 60 bytes a step beside coefficients. A run does not list the entries of tables that
its batches read, because its data tell them; where they have to be known without the data, each
takes two bytes or four. The running hash makes a changed, dropped, repeated, moved or spliced
record an error; steps are consecutive beside that. The CRC tells a record that was cut short by a
crash, which is left out, from one that was damaged, which is refused.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fwdlearn.errors import StorageError
from fwdlearn.ledger.files import replace_file, storing

MAGIC = b"FWDLEDG1"
_MOST_HEADER = 64 * 2**20
_LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<QIIIddBBH")
_CRC = struct.Struct("<I")
_TABLE = struct.Struct("<IB")
_HASH = 16
_KINDS = {0: None, 1: torch.float32, 2: torch.float64}
_SIZES = {0: 0, 1: 4, 2: 8}
FRESH, ALONE, LISTED, READ = 0, 1, 2, 4
"""Flags: nothing; that the coefficients are all that a step was, beside weights and optimizer; that
directions are zero in tables but for the entries that are listed; or but for those that the step's
batch reads."""
# Of the run's time, what waiting for the disk may take.
_SHARE = 0.001


@dataclass(frozen=True)
class Record:
    """A step before its update.

    Args:
        step: from 1.
        queries: of the estimate.
        nonfinite: queries that were dropped.
        loss, variance: of the estimate.
        alone: whether nothing but weights and optimizer lasts from this step to the next, so that
            the coefficients tell all of it.
        coefficients: [directions], float32 or float64 as the gradient uses them; None where the
            gradient is no sum of named directions, and the step has to be made again.
        entries: name of a table -> int64 [k], ascending, outside of which directions are zero; None
            for what the step's batch reads, which the data tell.
    """

    step: int
    queries: int
    nonfinite: int
    loss: float
    variance: float
    alone: bool
    coefficients: Tensor | None
    entries: Mapping[str, Tensor] | None = field(default_factory=dict)

    def body(self) -> bytes:
        """Everything but the running hash."""
        return packed(
            self.step,
            self.queries,
            self.nonfinite,
            self.loss,
            self.variance,
            self.alone,
            self.coefficients,
            self.entries,
        )


def packed(
    step: int,
    queries: int,
    nonfinite: int,
    loss: float,
    variance: float,
    alone: bool,
    coefficients: Tensor | None,
    entries: Mapping[str, Tensor] | None,
) -> bytes:
    """The body of a `Record`, which need not be made for it."""
    kind, payload, count = 0, b"", 0
    flags = ALONE if alone else FRESH
    if entries is None:
        flags |= READ
    elif entries:
        flags |= LISTED
        tables = _packed(entries)
        payload = _LENGTH.pack(len(tables)) + tables
    if coefficients is not None:
        kind = 2 if coefficients.dtype is torch.float64 else 1
        count = len(coefficients)
        payload += coefficients.numpy(force=True).tobytes()
    head = _HEAD.pack(step, count, queries, nonfinite, loss, variance, kind, flags, 0)
    return head + _CRC.pack(zlib.crc32(head)) + payload


class Ledger:
    """A ledger that has been read and checked from its first byte to its last.

    Attributes:
        path: the file.
        header: what the run began with.
        steps: how many records there are.
        end: bytes of the valid part.
        torn: bytes after it that a crash cut short; they hold no whole record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ends = array("Q")
        with _reading(path), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            self.header, hashed = _read_header(file, path)
            self._first = file.tell()
            self._hashes = [hashed]
            self._scan(file, size)
        self.torn = size - self.end

    @property
    def steps(self) -> int:
        return len(self._ends)

    @property
    def end(self) -> int:
        return self.end_of(self.steps)

    def hash(self, step: int) -> bytes:
        """The running hash after a step, 0 for that of the header."""
        if not step:
            return self._hashes[0]
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(self._ends[step - 1] - _HASH)
            return file.read(_HASH)

    def end_of(self, step: int) -> int:
        """Where the record of a step ends, 0 for the header."""
        return self._ends[step - 1] if step else self._first

    def record(self, step: int) -> Record:
        """The record of a step, 1 <= step <= steps."""
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(self.end_of(step - 1))
            return _parse(file.read(self._ends[step - 1] - file.tell()))

    def __iter__(self) -> Iterator[Record]:
        return (self.record(step) for step in range(1, self.steps + 1))

    def _scan(self, file: BinaryIO, size: int) -> None:
        running = self._hashes[0]
        while True:
            start = file.tell()
            head = file.read(_HEAD.size + _CRC.size)
            if len(head) < _HEAD.size + _CRC.size:
                return
            values = _HEAD.unpack_from(head)
            step, count, kind, flags = values[0], values[1], *values[6:8]
            if _CRC.unpack_from(head, _HEAD.size)[0] != zlib.crc32(head[: _HEAD.size]):
                if not any(head) and not any(file.read()):
                    return  # the system made the file longer and had no time to fill it
                raise self._damaged(start, "is damaged")
            if kind not in _SIZES:
                raise self._damaged(start, f"is of the unknown kind {kind}")
            if (payload := self._payload(file, size, count * _SIZES[kind], flags)) is None:
                return
            hashed = file.read(_HASH)
            running = blake2b(running + head + payload, digest_size=_HASH).digest()
            if running != hashed:
                if not any(hashed) and not any(file.read()):
                    return
                raise self._damaged(start, "is damaged, or does not follow the one before it")
            if step != self.steps + 1:
                raise self._damaged(start, f"says that it is of step {step}")
            self._ends.append(file.tell())

    def _payload(self, file: BinaryIO, size: int, length: int, flags: int) -> bytes | None:
        """What follows the head of a record, or None where the file ends within it."""
        entries = b""
        if flags & LISTED:
            entries = file.read(_LENGTH.size)
            if len(entries) < _LENGTH.size:
                return None
            length += _LENGTH.unpack(entries)[0]
        return None if file.tell() + length + _HASH > size else entries + file.read(length)

    def _damaged(self, start: int, what: str) -> StorageError:
        return StorageError(
            f"{self.path}: the record of step {self.steps + 1}, at byte {start}, {what}; the first "
            f"{self.steps} steps are sound: cut the file to {self.end} bytes to go on from there."
        )


class LedgerWriter:
    """Appends records.

    A record survives the end of the process once it is written. It also survives the end of the
    system once it is synced, which is waited for as often as takes a thousandth of the run's time.
    What a step changes is in memory, and nothing that outlives the system may be kept of it before
    `sync`: then what may be lost is computed again, and nobody can tell.

    Args:
        path: a ledger.
        end: bytes of its valid part; what follows is cut off.
        running: the running hash there.
    """

    def __init__(self, path: Path, end: int, running: bytes) -> None:
        self.path, self.end, self.running = path, end, running
        self._sync_due = 0.0
        with storing(path):
            self._handle = os.open(path, os.O_RDWR)
            os.ftruncate(self._handle, end)
            os.lseek(self._handle, end, os.SEEK_SET)
            os.fsync(self._handle)

    @classmethod
    def create(
        cls, path: Path, header: dict[str, Any], records: Iterable[Record] = ()
    ) -> LedgerWriter:
        """A new ledger with a header and the records that it begins with, whole or absent."""
        text = _canonical(header)
        content = bytearray(MAGIC + _LENGTH.pack(len(text)) + text)
        running = blake2b(content, digest_size=_HASH).digest()
        content += running
        for record in records:
            body = record.body()
            running = blake2b(running + body, digest_size=_HASH).digest()
            content += body + running
        with storing(path):
            replace_file(path, lambda file: file.write(content))
        return cls(path, len(content), running)

    def append(self, *bodies: bytes) -> None:
        """Writes records.

        Args:
            bodies: of `Record.body` or `packed`, in order.

        Raises:
            StorageError: the file ends where it ended before.
        """
        running, parts = self.running, []
        for body in bodies:
            running = blake2b(running + body, digest_size=_HASH).digest()
            parts += [body, running]
        data = left = b"".join(parts)
        try:
            while left:
                left = left[os.write(self._handle, left) :]
            if time.monotonic() >= self._sync_due:
                self._sync()
        except OSError:
            self._cut()
            with storing(self.path):
                raise
        self.end += len(data)
        self.running = running

    def sync(self) -> None:
        """Makes every record durable."""
        with storing(self.path):
            self._sync()

    def close(self) -> None:
        """Lets the file go."""
        os.close(self._handle)

    def _sync(self) -> None:
        begun = time.monotonic()
        os.fsync(self._handle)
        now = time.monotonic()
        self._sync_due = now + (now - begun) * (1 / _SHARE - 1)

    def _cut(self) -> None:
        try:
            os.ftruncate(self._handle, self.end)
            os.lseek(self._handle, self.end, os.SEEK_SET)
        except OSError:
            pass  # the reader leaves out a record that was cut short


def same(one: Record, other: Record) -> bool:
    """Whether two records are equal in every bit."""
    return one.body() == other.body()


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], bytes]:
    begin = file.read(len(MAGIC) + _LENGTH.size)
    if begin[: len(MAGIC)] != MAGIC:
        raise StorageError(
            f"{path} is no ledger, or one of another version: it begins with "
            f"{begin[: len(MAGIC)]!r} and not {MAGIC!r}."
        )
    if len(begin) < len(MAGIC) + _LENGTH.size:
        raise StorageError(f"{path}: the header is cut short; the file is of no use.")
    length = _LENGTH.unpack_from(begin, len(MAGIC))[0]
    if length > _MOST_HEADER:
        raise StorageError(f"{path}: the header is damaged: it says that it has {length} bytes.")
    text, hashed = file.read(length), file.read(_HASH)
    if blake2b(begin + text, digest_size=_HASH).digest() != hashed:
        raise StorageError(f"{path}: the header is damaged; the file is of no use.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: the header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise StorageError(f"{path}: the header is {type(header).__name__}, not keys and values.")
    return header, hashed


def _parse(body: bytes) -> Record:
    step, count, queries, nonfinite, loss, variance, kind, flags, _ = _HEAD.unpack_from(body)
    coefficients, start = None, _HEAD.size + _CRC.size
    entries: dict[str, Tensor] | None = None if flags & READ else {}
    if flags & LISTED:
        end = start + _LENGTH.size + _LENGTH.unpack_from(body, start)[0]
        entries = _unpacked(body[start + _LENGTH.size : end])
        start = end
    dtype = _KINDS[kind]
    if dtype is not None:
        coefficients = torch.empty(count, dtype=dtype)
        coefficients.view(torch.uint8).numpy()[:] = np.frombuffer(body[start:-_HASH], np.uint8)
    alone = bool(flags & ALONE)
    return Record(step, queries, nonfinite, loss, variance, alone, coefficients, entries)


def _packed(entries: Mapping[str, Tensor]) -> bytes:
    """For each table its name, how many entries, the bytes of each, and the steps between them."""
    parts = []
    for name, value in sorted(entries.items()):
        steps = np.diff(value.cpu().numpy(), prepend=0)
        width = 2 if len(steps) == 0 or steps.max() < 2**16 else 4
        parts.append(name.encode() + b"\0" + _TABLE.pack(len(steps), width))
        parts.append(steps.astype(f"<u{width}").tobytes())
    return b"".join(parts)


def _unpacked(left: bytes) -> dict[str, Tensor]:
    entries = {}
    while left:
        name, _, left = left.partition(b"\0")
        count, width = _TABLE.unpack_from(left)
        end = _TABLE.size + count * width
        steps = np.frombuffer(left[_TABLE.size : end], f"<u{width}").astype(np.int64)
        entries[name.decode()], left = torch.from_numpy(steps.cumsum()), left[end:]
    return entries


def _canonical(header: dict[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _reading(path: Path) -> Any:
    return _Reading(path)


class _Reading:
    """Inside, errors of the file system become StorageErrors about reading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StorageError(f"{self.path}: cannot be read: {error.strerror or error}") from error
