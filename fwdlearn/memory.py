"""What weights and optimizers take of the memory, and what the process has taken."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict

import torch
from torch import Tensor, nn


def peak_bytes(device: str) -> int:
    """The most memory in use so far: of the whole process on a CPU, of tensors on a GPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimizer will keep beside the weights, found on a matrix of its own."""
    total = 0
    for group in optimizer.param_groups:
        probe = nn.Parameter(torch.zeros(2, 2))
        probe.grad = torch.ones(2, 2)
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        twin.param_groups = [{**group, "params": [probe]}]
        # A schedule has wrapped the step of the original; the class's own knows nothing of it.
        type(twin).step(twin)
        values = twin.state[probe].values()
        kept = sum(isinstance(value, Tensor) and value.shape == probe.shape for value in values)
        total += kept * sum(p.numel() * p.element_size() for p in group["params"])
    return total
