"""What is on the device of weights that wait on the host, and what is sent ahead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fwdlearn.engine.window import Window

CPU = torch.device("cpu")


class Ahead(Window):
    """As on a GPU, with a log in the place of streams."""

    def __init__(self, hosts: dict[int, Tensor]) -> None:
        super().__init__(hosts, CPU)
        self.room *= 2
        self._side = object()  # type: ignore[assignment]
        self.log: list[tuple[str, int]] = []

    def _copy(self, key: int, locked: bool = True) -> Tensor:
        self.log.append(("waited", key))
        return super()._copy(key)

    def _send(self, key: int) -> None:
        self._copies[key] = super()._copy(key)
        self._coming[key] = None
        self.log.append(("sent", key))

    def _arrive(self, key: int) -> None:
        del self._coming[key]
        self.log.append(("arrived", key))

    def clear(self) -> None:
        self._side = None
        super().clear()
        self._side = object()  # type: ignore[assignment]


def tensors(*sizes: int) -> dict[int, Tensor]:
    return {key: torch.full((size,), float(key)) for key, size in enumerate(sizes)}


def test_a_copy_lasts_until_its_room_is_needed() -> None:
    hosts = tensors(4, 4, 2, 1, 1)
    window = Window(hosts, CPU)
    assert window.room == 16
    first = window.take({0: None})[0]
    assert first is not hosts[0]
    assert torch.equal(first, hosts[0])
    assert window.take({0: None})[0] is first
    second = window.take({2: None, 3: None})
    assert window.take({4: None})
    # Small ones lie side by side; a large one takes their place.
    assert window.take({2: None, 3: None})[2] is second[2]
    window.take({1: None})
    assert window.take({2: None})[2] is not second[2]
    assert window.most == 16
    # An operation gets what it needs, however much that is.
    assert window.take({0: None, 1: None}).keys() == {0, 1}
    assert window.most == 32
    assert window.seen == {0, 1, 2, 3, 4}


def test_the_next_one_is_sent_ahead_once_it_is_known() -> None:
    window = Ahead(tensors(4, 4, 4, 4))
    for _ in range(2):
        for key in range(4):
            assert float(window.take({key: None})[key][0]) == key
        window.clear()
    first, second = window.log[:4], window.log[4:]
    assert first == [("waited", key) for key in range(4)]
    # The first of a pass is the only one that is waited for.
    assert [entry for entry in second if entry[0] == "waited"] == [("waited", 0)]
    assert [key for what, key in second if what == "arrived"] == [1, 2, 3]
    assert window.most == window.room


def test_another_path_than_foreseen_gets_what_it_asks_for() -> None:
    window = Ahead(tensors(4, 4, 4, 4))
    for path in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 3, 0, 1), (0, 1, 2, 3)):
        for key in path:
            assert torch.equal(window.take({key: None})[key], torch.full((4,), float(key)))
        assert window.most <= window.room
        window.clear()


def test_a_tensor_that_is_used_twice_has_two_that_follow_it() -> None:
    """As a tied embedding, at both ends of a model."""
    window = Ahead(tensors(2, 4, 4))
    for _ in range(3):
        window.log.clear()
        for key in (0, 1, 2, 0):
            window.take({key: None})
        window.clear()
    assert [key for what, key in window.log if what == "waited"] == [0]
    assert [key for what, key in window.log if what == "sent"] == [1, 2, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_that_come_beside_what_is_computed_are_whole() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    hosts = {key: torch.full((2**22,), float(key)).pin_memory() for key in range(6)}
    window = Window(hosts, device)
    busy = torch.randn(2048, 2048, device=device)
    for _ in range(4):
        sums = []
        for key in hosts:
            for _ in range(4):
                busy = busy @ busy / busy.norm()
            sums.append(window.take({key: None})[key].sum())
        assert [float(one) for one in sums] == [float(key) * 2**22 for key in hosts]
        assert window.most <= window.room == 2 * 2**24
        window.clear()
