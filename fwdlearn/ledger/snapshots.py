"""Snapshots: everything that a run holds after a step, in one file that vouches for each byte.

The file is a safetensors file, so any tool can look at its weights. That format notices no flipped
bit, so the header also holds a digest of each tensor and one of itself.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fwdlearn.engine.quantized import stored
from fwdlearn.errors import StorageError
from fwdlearn.ledger.files import replace_file, storing, sync_folder

_LENGTH = struct.Struct("<Q")
_MOST_HEADER = 100 * 2**20
_KEPT = 2
_NAME = re.compile(r"snapshot-(\d{10})\.safetensors")
_PARTIAL = re.compile(r"\.snapshot-\d{10}\.safetensors\.partial")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMED = {name: dtype for dtype, name in _DTYPES.items()}


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@dataclass(frozen=True)
class Snapshot:
    """What a file holds.

    Args:
        meta: JSON values.
        tensors: name -> tensor, on the CPU.
    """

    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def digest(name: str, tensor: Tensor) -> str:
    """Of a tensor's name, dtype, shape and every byte."""
    return _digest(name, tensor.dtype, list(tensor.shape), *map(_bytes, stored(tensor)))


def write(path: Path, snapshot: Snapshot) -> None:
    """Writes a snapshot, whole or not at all.

    Raises:
        TypeError: a tensor is of a dtype that the format has no name for.
        OSError: as `replace_file`.
    """
    for name, tensor in snapshot.tensors.items():
        if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
            raise TypeError(f"{name} is a tensor of {tensor.dtype}, {tensor.layout}")
    digests = {name: digest(name, tensor) for name, tensor in snapshot.tensors.items()}
    header = _header(snapshot.meta, digests, snapshot.tensors)

    def put(file: BinaryIO) -> None:
        file.write(_LENGTH.pack(len(header)) + header)
        for tensor in snapshot.tensors.values():
            file.write(_bytes(tensor))

    replace_file(path, put)


def read(path: Path, empty: Callable[[int], Tensor] = _empty) -> Snapshot:
    """Reads a snapshot, and checks every byte of it.

    Args:
        empty: makes the memory of a tensor, uint8 [bytes].

    Raises:
        StorageError: it is damaged, or not one of ours.
    """
    try:
        with path.open("rb") as file:
            return _read(file, empty)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"{path}: the snapshot is damaged: {reason}") from error


def in_folder(folder: Path) -> list[tuple[int, Path]]:
    """The snapshots of a folder as (step, file), the newest first; nothing is read."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir())
    return sorted(((int(match[1]), entry) for match, entry in found if match), reverse=True)


def store(folder: Path, step: int, snapshot: Snapshot) -> Path:
    """Adds a snapshot to a folder, reads it back, and only then lets the oldest go.

    Raises:
        StorageError: it could not be written, or came back otherwise; none was let go.
    """
    path = folder / f"snapshot-{step:010d}.safetensors"
    with storing(path):
        folder.mkdir(exist_ok=True)
        write(path, snapshot)
    # A snapshot that cannot be read is none, and those before it stay. Nothing is kept of it here:
    # all tensors are read into the same memory.
    scratch = _empty(max((value.nbytes for value in snapshot.tensors.values()), default=0))
    read(path, lambda size: scratch[:size])
    with storing(folder):
        left = [entry for entry in folder.iterdir() if _PARTIAL.fullmatch(entry.name)]
        for old in [*left, *(old for _, old in in_folder(folder)[_KEPT:])]:
            old.unlink(missing_ok=True)
        sync_folder(folder)
    return path


def valid(
    folder: Path, empty: Callable[[int], Tensor] = _empty
) -> Iterator[tuple[int, Snapshot | StorageError]]:
    """The snapshots of a folder, the newest first, or why one is none."""
    for step, path in in_folder(folder):
        try:
            yield step, read(path, empty)
        except StorageError as error:
            yield step, error


def _read(file: BinaryIO, empty: Callable[[int], Tensor]) -> Snapshot:
    size = file.seek(0, 2)
    file.seek(0)
    begin = file.read(_LENGTH.size)
    length = _LENGTH.unpack(begin)[0] if len(begin) == _LENGTH.size else -1
    if not 0 <= length <= min(_MOST_HEADER, size - _LENGTH.size):
        raise ValueError("its header is longer than the file")
    text = file.read(length)
    entries = json.loads(text)
    ours = entries.pop("__metadata__")
    if ours["digest"] != _hashed(ours["fwdlearn"]):
        raise ValueError("its header is not as it was written")
    content = json.loads(ours["fwdlearn"])
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        dtype, shape = _NAMED[entry["dtype"]], entry["shape"]
        count = entry["data_offsets"][1] - entry["data_offsets"][0]
        if not 0 <= count <= size:
            raise ValueError(f"{name} is longer than the file")
        flat = empty(count)
        if file.readinto(flat.numpy()) != count:  # type: ignore[attr-defined]
            raise ValueError(f"{name} is cut short")
        if content["digests"][name] != _digest(name, dtype, shape, flat.numpy().data):
            raise ValueError(f"{name} is not as it was written")
        tensors[name] = flat.view(dtype).reshape(shape)
    # Every byte of the header follows from its content, so none can have changed.
    if text != _header(content["meta"], content["digests"], tensors) or file.read(1):
        raise ValueError("it holds more or less than was written")
    return Snapshot(content["meta"], tensors)


def _header(
    meta: Mapping[str, Any], digests: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> bytes:
    ours = json.dumps({"meta": meta, "digests": digests}, separators=(",", ":"))
    entries: dict[str, Any] = {"__metadata__": {"fwdlearn": ours, "digest": _hashed(ours)}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, stop]}
        entries[name], start = entry, stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Tensors begin at multiples of eight bytes.
    return text + b" " * (-len(text) % 8)


def _hashed(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(name: str, dtype: torch.dtype, shape: Any, *data: memoryview) -> str:
    hashed = blake2b(json.dumps([name, str(dtype), shape]).encode(), digest_size=16)
    for one in data:
        hashed.update(one)
    return hashed.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
