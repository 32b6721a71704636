"""What a frozen prefix makes of the rows, computed once a row and kept for all epochs.

In memory, or in files named by a digest of the prefix's weights and of the rows, so that the next
run finds them. What a prefix puts out for each token is kept without padding; what it puts out at
padding is never read back, so that whatever follows has to heed the mask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.data.types import Data, Dataset, TokenRows
from fwdlearn.errors import StorageError, UsageError

_ROWS = 64
# Rows that a prefix is calibrated by.
_SOME = 500


@dataclass(frozen=True)
class Seen:
    """Rows as a frozen prefix shows them.

    Args:
        kept: name -> [rows, ...]; or for what has one entry a token [tokens of all rows, ...].
        start: int64 [rows], where a row begins in what is kept by token.
        lengths: int64 [rows], its tokens.
        by_token: names of what has one entry a token.
        targets: [rows, ...].
    """

    kept: Mapping[str, Tensor]
    start: Tensor
    lengths: Tensor
    by_token: frozenset[str]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Tensor) -> Batch:
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(index) else 0
        place = torch.arange(width)
        mask = place < lengths[:, None]
        source = (self.start[index, None] + place)[mask]
        kwargs = {}
        for name, values in self.kept.items():
            if name in self.by_token:
                whole = values.new_zeros(len(index), width, *values.shape[1:])
                whole[mask] = values[source]
                kwargs[name] = whole
            else:
                kwargs[name] = values[index]
        return Batch((), self.targets[index], kwargs)


def seen(
    data: Data, prefix: nn.Module, device: str = "cpu", folder: str | Path | None = None
) -> Data:
    """The data as a frozen prefix shows them.

    Args:
        data: prepared for the prefix.
        prefix: maps a batch's inputs to a mapping of tensors with the rows first, which become the
            keyword inputs of what follows. In evaluation mode, nothing of it is trained.
        device: where it runs; what it shows is kept on the CPU.
        folder: where files are kept; None for memory.

    Raises:
        UsageError: the prefix puts out something else.
        StorageError: a kept file is damaged, or cannot be written.
    """
    prefix.to(device)
    calibrate = getattr(prefix, "calibrate", None)
    if calibrate is not None:
        some = data.train.batch(torch.arange(min(_SOME, len(data.train)))).to(device)
        with torch.inference_mode(False), torch.no_grad():
            calibrate(*some.args, **some.kwargs)
    train, evaluation = _of(data.train, prefix, device, folder), data.evaluation
    if evaluation is not None:
        evaluation = _of(evaluation, prefix, device, folder)
    return replace(data, train=train, evaluation=evaluation)


def _of(rows: Dataset, prefix: nn.Module, device: str, folder: str | Path | None) -> Seen:
    if folder is None:
        return _run(rows, prefix, device)
    place = Path(folder) / _digest(rows, prefix)
    if not (place / "seen.json").is_file():
        _store(_run(rows, prefix, device), place)
    return _load(place)


@torch.inference_mode()
def _run(rows: Dataset, prefix: nn.Module, device: str) -> Seen:
    count = len(rows)
    lengths = torch.zeros(count, dtype=torch.int64)
    if isinstance(rows, TokenRows):
        lengths = rows.lengths.clamp(max=rows.limit)
    start = torch.cumsum(lengths, 0) - lengths
    by_token = _by_token(rows, prefix, device) if isinstance(rows, TokenRows) else frozenset()
    kept: dict[str, Tensor] = {}
    targets: Tensor | None = None
    # Rows of a length together, so that little padding is computed.
    for index in lengths.argsort(stable=True).split(_ROWS):
        batch = rows.batch(index)
        made = _shown(prefix, batch, device)
        if targets is None:
            targets = batch.targets.new_zeros(count, *batch.targets.shape[1:])
            for name, value in made.items():
                size, rest = (int(lengths.sum()), 2) if name in by_token else (count, 1)
                kept[name] = torch.zeros(size, *value.shape[rest:], dtype=value.dtype)
        targets[index] = batch.targets
        for name, value in made.items():
            if name not in by_token:
                kept[name][index] = value.cpu()
                continue
            token = torch.arange(value.shape[1])
            mask = token < lengths[index, None]
            kept[name][(start[index, None] + token)[mask]] = value.cpu()[mask]
    assert targets is not None
    # Ordinary tensors: what is made in inference mode cannot be trained on.
    with torch.inference_mode(False):
        kept = {name: value.clone() for name, value in kept.items()}
        return Seen(kept, start.clone(), lengths.clone(), by_token, targets.clone())


def _shown(prefix: nn.Module, batch: Batch, device: str) -> Mapping[str, Tensor]:
    batch = batch.to(device)
    made: Any = prefix(*batch.args, **batch.kwargs)
    if not isinstance(made, Mapping) or not all(
        isinstance(value, Tensor) and value.shape[:1] == (len(batch),) for value in made.values()
    ):
        raise UsageError(
            f"{type(prefix).__name__} must return a mapping of tensors with the rows first, so "
            "that its results can be kept."
        )
    return made


def _by_token(rows: TokenRows, prefix: nn.Module, device: str) -> frozenset[str]:
    """What grows with the padding of a batch."""
    shapes = []
    row = rows.batch(rows.lengths.argmin()[None])
    for more in (0, 1):
        padded = row.map(lambda value, n=more: _padded(value, n))  # type: ignore[misc]
        shown = _shown(prefix, Batch((), row.targets, padded.kwargs), device)
        shapes.append({name: tuple(value.shape) for name, value in shown.items()})
    return frozenset(name for name in shapes[0] if shapes[0][name] != shapes[1][name])


def _padded(value: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, more)) if value.dim() == 2 else value


def _digest(rows: Dataset, prefix: nn.Module) -> str:
    """Of all that the results depend on: the prefix and the rows."""
    found = blake2b(digest_size=16)
    # Settings that are no weights, such as which layer is shown.
    found.update(str(prefix).encode())
    for name, value in sorted(prefix.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(_bytes(value))
    for index in torch.arange(len(rows)).split(_ROWS):
        batch = rows.batch(index)
        for value in (*batch.args, *batch.kwargs.values(), batch.targets):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(_bytes(value))
    return found.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _store(made: Seen, place: Path) -> None:
    tensors = {**made.kept, ".start": made.start, ".lengths": made.lengths}
    tensors[".targets"] = made.targets
    facts: dict[str, Any] = {"by_token": sorted(made.by_token), "tensors": {}}
    partial = place.with_name(f".{place.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for number, (name, value) in enumerate(tensors.items()):
            data = _bytes(value)
            (partial / f"{number}.bin").write_bytes(data)
            facts["tensors"][name] = {
                "file": f"{number}.bin",
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": list(value.shape),
                "digest": blake2b(data, digest_size=16).hexdigest(),
            }
        (partial / "seen.json").write_text(json.dumps(facts), "utf-8")
        if not place.exists():
            partial.rename(place)
    except OSError as error:
        raise StorageError(f"{place}: what a prefix shows cannot be kept ({error}).") from error


def _load(place: Path) -> Seen:
    tensors: dict[str, Tensor] = {}
    try:
        facts = json.loads((place / "seen.json").read_text("utf-8"))
        for name, fact in facts["tensors"].items():
            path = place / fact["file"]
            if blake2b(path.read_bytes(), digest_size=16).hexdigest() != fact["digest"]:
                raise ValueError(f"{name} is not as it was written")
            dtype, shape = getattr(torch, fact["dtype"]), fact["shape"]
            # Mapped, not read: pages that are needed come in, and can go again. Private, so that
            # nobody writes into the file.
            size = torch.Size(shape).numel()
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=dtype)
            tensors[name] = mapped.view(shape)
        parts = [tensors.pop(f".{name}") for name in ("start", "lengths", "targets")]
        return Seen(tensors, parts[0], parts[1], frozenset(facts["by_token"]), parts[2])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"{place}: cannot be used ({reason}); remove the folder.") from error
