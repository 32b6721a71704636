"""Exact slopes equal torch's own forward mode and differences of losses, for every model."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.keys import Key

from .models import CASES, built
from .slope_reference import Wide, by_differences, by_jvp, check, queries

KINDS = [("rademacher", 1), ("rademacher", 2), ("rademacher", None), ("gaussian", 1)]
ROWS, COUNT = 4, 4


# They compute in float32 in places.
NARROW = {"llama", "odd"}


@pytest.mark.parametrize(("law", "rank"), KINDS)
@pytest.mark.parametrize("name", list(CASES))
def test_slopes_are_exact(name: str, law: str, rank: int | None) -> None:
    case = CASES[name]
    batch = case.batch(ROWS).to("cpu", torch.float64)
    for wide in (True, False) if name in NARROW else (False,):
        engine = Engine(built(name), case.objective)
        family = Directions(Key.root(1), dict(engine.params), COUNT, law, rank)
        with Wide() if wide else nullcontext():
            dense, differences = by_jvp(engine, batch, family), None
            if wide or name not in NARROW:
                differences = by_differences(engine, batch, family)
            for private in (False, True):
                row, direction = queries(ROWS, COUNT, private)
                with torch.inference_mode():
                    losses, slopes = engine.slopes(batch, row, family, direction)
                    clean = engine.losses(batch, row)
                check(slopes, dense[direction, row], 1e-10, f"jvp, private={private}")
                torch.testing.assert_close(losses, clean, rtol=1e-12, atol=0)
                if differences is not None:
                    check(slopes, differences[direction, row], 1e-6, f"differences, {private}")
        assert [choice.rung for choice in engine.exact.events] == ["dual"]
