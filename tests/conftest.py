"""Options of the test suite, and what holds around every test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write tests/golden/*.json anew instead of failing on a difference",
    )

    parser.addoption(
        "--kills", type=int, default=100, help="how often slow tests kill runs, all cases together"
    )


@pytest.fixture(autouse=True)
def generators_untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Loaders and factories leave the global generators as they were."""
    if not {"data", "models"} & set(request.path.parts):
        yield
        return
    torch_before = torch.get_rng_state()
    numpy_before = np.random.get_state(legacy=False)["state"]["key"].copy()
    yield
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state(legacy=False)["state"]["key"] == numpy_before).all()
