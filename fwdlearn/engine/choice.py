"""What an engine says of the way that it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """The rung in use and why it is."""

    rung: str
    reason: str
