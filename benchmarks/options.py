"""What the command line of a measurement takes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.results import FOLDER

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """See `options`."""

    rounds: int
    only: str
    output: Path
    device: str
    flags: frozenset[str]


def options(name: str, rounds: int, **flags: str) -> Options:
    """Reads the command line of `python -m benchmarks.NAME`.

    Args:
        flags: name -> help of switches of its own.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="that are measured; medians over them"
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="measures what has it in its name (* stands for anything), and keeps the results of "
        "the rest",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="results/NAME.json, NAME-cuda.json on a GPU"
    )
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    asked = parser.parse_args()
    kind = torch.device(asked.device).type
    file = FOLDER / (f"{name}.json" if kind == "cpu" else f"{name}-{kind}.json")
    if asked.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {asked.rounds}")
    given = frozenset(flag for flag in flags if getattr(asked, flag))
    return Options(asked.rounds, asked.only, asked.output or file, asked.device, given)


def chosen(everything: Mapping[str, T], pattern: str) -> dict[str, T]:
    """What has the pattern in its name.

    Raises:
        SystemExit: nothing has.
    """
    found = {name: one for name, one in everything.items() if fnmatch(name, f"*{pattern}*")}
    if not found:
        raise SystemExit(f"--only {pattern!r} fits none of: {'; '.join(everything)}.")
    return found
