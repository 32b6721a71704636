"""Small tables for results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """A title and a line for each pair."""
    typer.echo(typer.style(title, bold=True))
    width = max((len(key) for key, _ in pairs), default=0)
    for key, value in pairs:
        typer.echo(f"  {typer.style(f'{key:{width}}', fg='cyan')}  {value}")


def explanation(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `Trainer.explain` says, in words and units."""
    shown = dict(facts)
    pairs = [("rung", f"{shown.pop('rung', '?')}: {shown.pop('reason', '')}".rstrip(": "))]
    if shown.get("steps") is not None:
        pairs.append(("steps", f"{shown.pop('steps'):,}"))
    if "queries_per_step" in shown:
        total = f"{shown.pop('queries_per_step'):,}"
        if {"rows", "directions"} <= shown.keys():
            total += f" ({shown.pop('rows'):,} rows, {shown.pop('directions'):,} directions)"
        pairs.append(("queries a step", total))
    if shown.get("queries_per_second"):
        pairs.append(("queries a second", f"about {shown.pop('queries_per_second'):,.0f}"))
    if "memory_bytes" in shown:
        pairs.append(("peak memory", f"about {size(shown.pop('memory_bytes'))}"))
    if "memory_parts" in shown:
        parts = {name: f"{name} {size(count)}" for name, count in shown.pop("memory_parts").items()}
        always = [parts.pop(name) for name in ("process", "weights", "optimizer")]
        pairs.append(
            ("of it", f"{' + '.join(always)} + the largest of {', '.join(parts.values())}")
        )
    if "fits" in shown:
        pairs += _room(shown)
    if "parameters" in shown:
        count = f"{shown.pop('parameters'):,}"
        if "trainable" in shown:
            count += f", {shown.pop('trainable'):,} of them trained"
        pairs.append(("parameters", count))
    return pairs + [(key.replace("_", " "), str(value)) for key, value in shown.items()]


def _room(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """Where weights are and whether all fits; takes the facts that it tells."""
    device, offload = shown.pop("device"), shown.pop("offload")
    elsewhere, fits = shown.pop("offloaded_bytes"), shown.pop("fits")
    room, without = shown.pop("memory_room_bytes"), shown.pop("with_offload_bytes", None)
    where = f"on {device}"
    if offload is not None:
        where = "in host memory" if offload == "cpu" else f"in files in {offload}"
    if elsewhere:
        where += f": {size(elsewhere)}, with what the optimizer keeps"
    pairs = [("weights", where)]
    if room is not None:
        pairs.append(("fits", f"{'yes' if fits else 'no'}: there are {size(room)} on {device}"))
    if not fits and without is not None:
        way = "trainer.offload=FOLDER" if device == "cpu" else "trainer.offload=cpu"
        pairs.append(("with offload", f"about {size(without)}: set {way}"))
    return pairs


def size(count: float) -> str:
    """Bytes in a unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
