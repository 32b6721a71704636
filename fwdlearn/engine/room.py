"""What becomes of a pass that memory does not suffice for: smaller blocks, the same queries.

Passes write nothing, so one that failed can be asked again; how many queries ran together changes
no result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# What torch says where a CPU has no memory left: it is no error of a kind of its own.
_CPU = "DefaultCPUAllocator"


class Room:
    """How much smaller blocks are than they were meant to be; one for all passes of a kind.

    Attributes:
        halvings: how often memory ran out.
    """

    def __init__(self) -> None:
        self.halvings = 0
        self._largest = 0

    def of(self, rows: int) -> int:
        """Rows of a block that was meant to have `rows`."""
        size = max(1, rows >> self.halvings)
        self._largest = max(self._largest, size)
        return size

    def retry(self, run: Callable[[], T]) -> T:
        """Runs a pass, and again with blocks of half the size as often as memory runs out.

        Raises:
            torch.OutOfMemoryError: blocks cannot be made smaller.
        """
        while True:
            self._largest = 0
            try:
                return run()
            except RuntimeError as error:
                if not out_of_memory(error) or self._largest <= 1:
                    raise
            # Here, where the error no longer holds the tensors of the pass.
            self.halvings += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU in str(error)
