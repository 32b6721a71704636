"""What becomes of the pages of freed tensors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fwdlearn.memory import kept_below

# Blocks of a megabyte, freed: what the process still holds of 64 of them, in megabytes.
SCRIPT = """
import torch
from fwdlearn.memory import freed_pages_return, in_use_bytes, keep_freed_pages

def held():
    before = in_use_bytes("cpu")
    blocks = [torch.ones(2**18) for _ in range(64)]
    del blocks
    return (in_use_bytes("cpu") - before) / 2**20

done = keep_freed_pages({below})
with freed_pages_return():
    within = held()
print(done, within, held())
"""


@pytest.mark.parametrize(("below", "returned"), [(2**22, True), (2**30, False)])
def test_pages_are_kept_and_go_back_where_they_are_short(below: int, returned: bool) -> None:
    usual = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    line = [sys.executable, "-c", SCRIPT.format(below=below)]
    out = subprocess.run(line, check=True, capture_output=True, text=True, env=usual).stdout
    done, within, after = out.split()
    if done == "False":
        pytest.skip("another allocator than glibc's, or one that is told what to do")
    assert (float(within) < 8) == returned
    if returned:
        assert float(after) > 48


def test_large_blocks_are_kept_beside_few_weights() -> None:
    with torch.device("meta"):
        small, large = nn.Linear(8, 8), nn.Linear(2**15, 2**14)
    assert kept_below(small) == 2**30 and kept_below(large) == 2**22
