"""The copies of weights that are on the device: those of an operation, and on a GPU of the next.

What comes next is what came next the last time. Copies that nobody needs are the first to go; the
room is that of the largest weight, twice so where the next ones come while the device computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Operations that are looked ahead at most.
_AHEAD = 32

Ids = tuple[int, ...]


class Window:
    """Copies of some tensors.

    Args:
        hosts: id of a parameter -> what it is on the host.
        device: where copies are.

    Attributes:
        room: bytes that copies take at most, unless one operation needs more.
        seen: ids of the parameters that have been asked for so far.
        most: bytes of copies that there were at once so far.
    """

    def __init__(self, hosts: Mapping[int, Tensor], device: torch.device) -> None:
        self.hosts, self.device = hosts, device
        self.seen: set[int] = set()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        largest = max((value.nbytes for value in hosts.values()), default=0)
        self.room = largest * (1 if self._side is None else 2)
        self.most = 0
        self._copies: dict[int, Tensor] = {}
        self._coming: dict[int, Any] = {}
        self._after: dict[tuple[Ids, Ids], Ids] = {}
        self._last: tuple[Ids, Ids] = ((), ())

    def take(self, wanted: Mapping[int, Any]) -> dict[int, Tensor]:
        """The copies that an operation takes, by the ids of parameters."""
        ids = tuple(wanted)
        self.seen.update(ids)
        if ids != self._last[1]:
            self._after[self._last] = ids
            self._last = self._last[1], ids
        following = [] if self._side is None else self._following()
        self._make_room({*ids, *following}, [*ids, *following])
        for key in ids:
            if key not in self._copies:
                self._copies[key] = self._copy(key)
            elif key in self._coming:
                self._arrive(key)
        for key in following:
            if key not in self._copies:
                self._send(key)
        self.most = max(self.most, sum(copy.nbytes for copy in self._copies.values()))
        return {key: self._copies[key] for key in ids}

    def clear(self) -> None:
        """Lets all copies go; nothing reads the host any more."""
        if self._side is not None:
            torch.cuda.synchronize(self.device)
        self._coming.clear()
        self._copies.clear()
        self._last = ((), ())

    def _following(self) -> list[int]:
        """What the next operations take, as far as there is room for it."""
        found: list[int] = []
        at, total = self._last, sum(self.hosts[key].nbytes for key in self._last[1])
        for _ in range(_AHEAD):
            ids = self._after.get(at)
            if ids is None:
                break
            fresh = [key for key in ids if key not in found and key not in self._last[1]]
            total += sum(self.hosts[key].nbytes for key in fresh)
            if total > self.room:
                break
            found += fresh
            at = at[1], ids
        return found

    def _make_room(self, needed: set[int], order: list[int]) -> None:
        missing = sum(self.hosts[key].nbytes for key in order if key not in self._copies)
        held = sum(copy.nbytes for copy in self._copies.values())
        for key in [key for key in self._copies if key not in needed]:
            if held + missing <= self.room:
                break
            if key in self._coming:
                # The device is to have done with it before its memory is another's.
                self._arrive(key)
            held -= self._copies.pop(key).nbytes

    def _copy(self, key: int, locked: bool = True) -> Tensor:
        with _plainly():
            return self.hosts[key].to(self.device, non_blocking=locked, copy=True)

    def _send(self, key: int) -> None:
        """Starts a copy beside what the device computes."""
        assert self._side is not None
        with torch.cuda.stream(self._side):
            self._copies[key] = self._copy(key)
            self._coming[key] = self._side.record_event()

    def _arrive(self, key: int) -> None:
        """Lets the device wait for a copy that was sent."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._coming.pop(key))
        self._copies[key].record_stream(current)


@contextmanager
def _plainly() -> Iterator[None]:
    """Within, what is made is an ordinary tensor, whatever transformation is under way."""
    functorch: Any = torch._C._functorch
    clear: AbstractContextManager[object] = nullcontext()
    if functorch.peek_interpreter_stack() is not None:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

        clear = temporarily_clear_interpreter_stack()
    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(clear)
        yield
