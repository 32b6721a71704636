"""The memory of a process: what it takes, what is left, and what becomes of freed pages."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

# Parameters of glibc's mallopt; its environment variables, with which a user decides instead.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_DECIDED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
# Weights of which kept pages would be a large part, and the blocks that are kept all the same.
_MANY_WEIGHTS, _SMALL_BLOCK = 2**30, 2**22
_LEAST = 2**17
# Of the process: as it was last set.
_below: int | None = None


def keep_freed_pages(below: int = 2**30) -> bool:
    """Keeps the pages of freed tensors in the process, so that the next tensor finds them mapped.

    glibc hands the pages of large blocks back to the system, and every step then pays for
    thousands of page faults that fill them with zeros again. Kept, they are reused. The peak does
    not change but for fragmentation, a few percent either way; the memory in use between two steps
    stays near it. The setting lasts as long as the process.

    Args:
        below: blocks of so many bytes and more go back all the same; at most 2^30.

    Returns:
        Whether it was done: not where there is no glibc, nor where MALLOC_TRIM_THRESHOLD_,
        MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES is set, which then decide.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _DECIDED):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # Blocks below the threshold come from the heap, which -1 says never to shrink.
    done = bool(libc.mallopt(_MMAP_THRESHOLD, below) and libc.mallopt(_TRIM_THRESHOLD, -1))
    global _below
    _below = below if done else None
    return done


@contextmanager
def freed_pages_return() -> Iterator[None]:
    """Within, freed pages go back all the same.

    For what is done once and leaves small things among large ones: the holes between them, which
    nothing fits into, would stay. It takes a while, and is done where pages are short.
    """
    if _below is None or _below > _SMALL_BLOCK:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _LEAST)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _below)


def kept_below(model: nn.Module) -> int:
    """How large blocks are whose pages a run of the model had better keep.

    Beside many weights there is little else, and what remains of a large block that was freed is a
    part of the peak; to map it again is nothing beside a pass over such weights.
    """
    return 2**30 if weights_bytes(model) < _MANY_WEIGHTS else _SMALL_BLOCK


def peak_bytes(device: str) -> int:
    """The most memory in use so far: of the whole process on a CPU, of tensors on a GPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # What getrusage says on Linux may be the peak of the process that started this one.
    known = _status("VmHWM:")
    if known is not None:
        return known
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_use_bytes(device: str) -> int:
    """The memory in use now: of the whole process on a CPU, of tensors on a GPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    known = _status("VmRSS:")
    # Where the system does not say, the peak is all that can be had.
    return peak_bytes(device) if known is None else known


def private_bytes() -> int:
    """The memory in use now that no file stands behind, which the system cannot take back."""
    known = _status("RssAnon:")
    return in_use_bytes("cpu") if known is None else known


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(name))
    return next((int(kibibytes) * 1024 for kibibytes in found), None)


def free_bytes(device: str) -> int | None:
    """The memory that this process may still take, or None where the system does not say."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    try:
        available = _entries("/proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        return None
    try:
        # A container's own limit; pages of files that it has not used lately can go.
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = _entries(group / "memory.stat").get("inactive_file", 0)
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - used + cached))


def _entries(path: str | Path) -> dict[str, int]:
    words = (line.split() for line in Path(path).read_text("ascii").splitlines())
    return {name: int(value) for name, value, *_ in words}


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
