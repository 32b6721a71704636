"""A run's `model/` folder: weights as safetensors, and what they are the weights of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fwdlearn.errors import MissingError, StorageError
from fwdlearn.ledger.files import storing, sync_file, sync_folder
from fwdlearn.ledger.snapshots import digest

DESCRIPTION = "model.json"
WEIGHTS = "model.safetensors"


def save_model(
    module: nn.Module,
    folder: Path,
    description: Mapping[str, Any],
    save: Callable[[Path], None] | None = None,
) -> None:
    """Writes the folder, whole or not at all.

    Args:
        module: the model.
        folder: where; replaced if it is there.
        description: goes into `model.json`.
        save: writes the model in a format of its own instead (see `Built.save`).
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with storing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if save is not None:
            save(partial)
        else:
            tensors, tied = _distinct(module)
            try:
                save_file(tensors, partial / WEIGHTS)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            digests = {name: digest(name, tensor) for name, tensor in tensors.items()}
            held = {**description, "tied": tied, "digests": digests}
            text = json.dumps(held, indent=2) + "\n"
            (partial / DESCRIPTION).write_text(text, "utf-8")
            # safetensors makes files that nobody else can read.
            shutil.copymode(partial / DESCRIPTION, partial / WEIGHTS)
        for path in (entry for entry in partial.rglob("*") if entry.is_file()):
            sync_file(path)
        sync_folder(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_folder(folder.parent)


def load_model(module: nn.Module, folder: Path) -> None:
    """Reads weights that `save_model` wrote into a module of the same shape.

    Raises:
        MissingError: there are none.
        StorageError: they cannot be read, are not as they were written, or do not fit the module.
    """
    tensors = read_model(folder)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise _unusable(folder, error) from error


def read_model(folder: Path) -> dict[str, Tensor]:
    """The weights that `save_model` wrote, by every name that they have; see `load_model`."""
    if not (folder / WEIGHTS).exists():
        raise MissingError(f"{folder} holds no weights; the run may not have finished")
    try:
        tensors = load_file(folder / WEIGHTS)
        held = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        # Folders of before there were digests have none.
        digests = held.get("digests", {name: None for name in tensors})
        for name in tensors.keys() | digests.keys():
            if digests[name] not in (None, digest(name, tensors[name])):
                raise ValueError(f"{name} is not as it was written")
        return tensors | {name: tensors[kept] for name, kept in held["tied"].items()}
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: Exception) -> StorageError:
    reason = " ".join(str(error).split())
    return StorageError(f"{folder}: the weights cannot be used: {reason}")


def _distinct(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, and the other names of those that have several."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise StorageError(f"{name} of the model's state is not a tensor, so cannot be saved")
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            # A copy, because safetensors refuses tensors that share part of their memory. One that
            # has it to itself may be larger than what is left.
            alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            tensors[name] = tensor.detach().to(
                "cpu", copy=not alone, memory_format=torch.contiguous_format
            )
    return tensors, tied
