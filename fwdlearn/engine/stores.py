"""Where weights lie that are not on the device: in memory, or in files that the system pages."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import UntypedStorage

from fwdlearn.errors import StorageError

# What takes no more than a page of memory is not worth a file.
_PAGE = 4096


class Store(Protocol):
    """Keeps bytes on the host."""

    def keep(self, content: UntypedStorage) -> UntypedStorage:
        """A place on the host that holds the same bytes; the very same where they lie well."""

    def empty(self, size: int) -> UntypedStorage:
        """A place for so many bytes."""


class Memory:
    """Memory of the host; locked where a GPU is to read it while it computes.

    Args:
        device: that reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self._locked = device.type == "cuda"

    def keep(self, content: UntypedStorage) -> UntypedStorage:
        """See `Store.keep`."""
        host = content.cpu()
        return host.pin_memory() if self._locked and host.nbytes() else host

    def empty(self, size: int) -> UntypedStorage:
        """See `Store.empty`."""
        return UntypedStorage(size)


class Folder:
    """Files that are mapped into memory: what has not been used lately need not be there.

    The files have no names, so that none is left behind, however the process ends. Their space is
    taken at once: a disk that is full says so here, and not in the middle of a step.

    Args:
        path: of the folder, made where it is not there.

    Raises:
        StorageError: nothing can be written there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._file(_PAGE)
        except OSError as error:
            raise self._refused(error) from error

    def keep(self, content: UntypedStorage) -> UntypedStorage:
        """See `Store.keep`.

        Raises:
            StorageError: there is no room left.
        """
        if content.nbytes() <= _PAGE:
            return content.cpu()
        mapped = self.empty(content.nbytes())
        mapped.copy_(content)
        return mapped

    def empty(self, size: int) -> UntypedStorage:
        """See `Store.empty`."""
        if size <= _PAGE:
            return UntypedStorage(size)
        try:
            return self._file(size)
        except OSError as error:
            raise self._refused(error, size) from error

    def _file(self, size: int) -> UntypedStorage:
        handle, name = self._opened()
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:
                os.truncate(handle, size)
            mapped = UntypedStorage.from_file(name, True, size)
            assert isinstance(mapped, UntypedStorage)
            return mapped
        finally:
            os.close(handle)
            with suppress(OSError):
                os.unlink(name)

    def _opened(self) -> tuple[int, str]:
        """A new file, and a name that it can be opened by again for now."""
        with suppress(OSError, AttributeError):
            # Where there is such a thing, a file never has a name of its own.
            handle = os.open(self.path, os.O_TMPFILE | os.O_RDWR, 0o600)
            return handle, f"/proc/self/fd/{handle}"
        return tempfile.mkstemp(dir=self.path, prefix=".fwdlearn-")

    def _refused(self, error: OSError, size: int = 0) -> StorageError:
        wanted = f" for {size} bytes of weights" if size else ""
        return StorageError(
            f"{self.path}: cannot be used{wanted}: {error.strerror or error}; free some space, or "
            "choose another folder with trainer.offload=FOLDER."
        )
