"""What the process has taken of the device's memory."""

from __future__ import annotations

import sys

import torch


def peak_bytes(device: str) -> int:
    """The most memory in use so far: of the whole process on a CPU, of tensors on a GPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024
