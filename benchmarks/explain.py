"""What `fwdlearn explain` foretells of a run, against what a run of that recipe then takes.

    python -m benchmarks.explain [--images FOLDER] [--reviews FOLDER] [--rounds N] [--only PATTERN]

Every shipped recipe, in processes of their own: `explain`, then a `train` of some ten seconds, in
turns. Compared are the peak memory of the process and the queries a second of the steps. FOLDER
holds the data of recipes that want IDX files or JSON lines; without them, and where a text or a
table is wanted, a few rows of the same form are made up.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.results import FOLDER, merge
from fwdlearn.recipe.locate import shipped
from fwdlearn.recipe.text import parse

# Of the steps of a short run.
SECONDS = 10.0
BOOK, TABLE = "book.txt", "table.csv"


def images(folder: Path) -> None:
    """IDX files of noise."""
    for split, rows in (("train", 2048), ("t10k", 512)):
        noise = random.Random(rows).randbytes(rows * 28 * 28)
        labels = bytes(row % 10 for row in range(rows))
        for name, shape, data in (
            ("images-idx3", (rows, 28, 28), noise),
            ("labels-idx1", (rows,), labels),
        ):
            head = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(head + data))


def reviews(folder: Path) -> None:
    """JSON lines of words."""
    words = "a film that moves slowly and then all at once, with actors who know why".split()
    draw = random.Random(0)
    for split, rows in (("train", 1024), ("validation", 256)):
        texts = (" ".join(draw.choices(words, k=draw.randint(8, 40))) for _ in range(rows))
        lines = (json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def book(folder: Path) -> None:
    """A text of words."""
    words = "the of and to in a is that it was for on as with his he be at by this".split()
    text = " ".join(random.Random(0).choices(words, k=20_000))
    (folder / BOOK).write_text(text, "utf-8")


def table(folder: Path) -> None:
    """A walk and what goes with it, a time a line."""
    draw, level, lines = random.Random(0), 0.0, ["load,heat,wind"]
    for _ in range(3000):
        level = 0.95 * level + draw.gauss(0, 1)
        lines.append(f"{level:.3f},{draw.gauss(level, 1):.3f},{draw.random():.3f}")
    (folder / TABLE).write_text("\n".join(lines) + "\n", "utf-8")


def loader(text: str) -> str:
    """Name of what loads a recipe's data."""
    section = parse(text, "")[0].data["data"]
    return section if isinstance(section, str) else str(section["name"])


def command(*words: str) -> str:
    """What `fwdlearn` prints, in a process of its own."""
    line = [sys.executable, "-m", "fwdlearn", *words]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def foretold(recipe: str, settings: list[str]) -> dict[str, Any]:
    """What `explain` says."""
    return dict(json.loads(command("explain", recipe, *settings, "--json")))


def measured(recipe: str, settings: list[str], folder: Path) -> tuple[float, float]:
    """Bytes of a run, and its queries a second."""
    command("train", recipe, *settings, f"output.dir={folder}", "--quiet")
    summary = json.loads((folder / "summary.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    records = [record for record in records if record.get("queries_per_second")]
    seconds, before = 0.0, 0
    for record in records:
        seconds += (record["queries"] - before) / record["queries_per_second"]
        before = record["queries"]
    return summary["memory.peak_bytes"], before / seconds


def compare(recipe: str, settings: list[str], rounds: int) -> dict[str, Any]:
    """One recipe: medians, and the largest error of any round."""
    first = foretold(recipe, settings)
    steps = max(4, int(SECONDS * first["queries_per_second"] / first["queries_per_step"]))
    short = ("trainer.queries=null", f"trainer.steps={steps}", "trainer.log_every=2")
    settings = [*settings, *short, f"trainer.evaluate_every={steps}"]
    pairs = []
    for _ in range(rounds):
        with TemporaryDirectory() as folder:
            facts = foretold(recipe, settings)
            asked = facts["memory_bytes"], facts["queries_per_second"]
            pairs.append((asked, measured(recipe, settings, Path(folder) / "run")))
    entry: dict[str, Any] = {"work": recipe}
    for place, name in enumerate(("memory_bytes", "queries_per_second")):
        told, seen = ([pair[side][place] for pair in pairs] for side in (0, 1))
        errors = [a / b - 1 for a, b in zip(told, seen, strict=True)]
        entry |= {f"{name}.foretold": median(told), f"{name}.measured": median(seen)}
        entry[f"{name}.largest_error"] = max(errors, key=abs)
    return entry


def show(entry: dict[str, Any]) -> None:
    cells = [f"{entry['work']:24}"]
    for name, unit in (("memory_bytes", 2**20), ("queries_per_second", 1)):
        cells += [f"{entry[f'{name}.{side}'] / unit:12,.0f}" for side in ("foretold", "measured")]
        cells.append(f"{entry[f'{name}.largest_error']:9.1%}")
    print("".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explain")
    parser.add_argument("--images", type=Path, metavar="FOLDER")
    parser.add_argument("--reviews", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--output", type=Path, default=FOLDER / "explain.json", metavar="FILE")
    asked = parser.parse_args()
    head = f"{'MiB foretold':>12}{'measured':>12}{'error':>9}"
    print(f"{'recipe':24}{head}{'queries/s':>12}{'measured':>12}{'error':>9}")
    entries = []
    with TemporaryDirectory() as made:
        # Loader -> where the data is, what makes some, and the settings that name it.
        sources: dict[str, tuple[Path | None, Callable[[Path], None], str]] = {
            "idx": (asked.images, images, "data.path={}"),
            "jsonl": (asked.reviews, reviews, "data.path={}"),
            "characters": (None, book, f"data.path={{}}/{BOOK}"),
            "csv_series": (None, table, f"data.path={{}}/{TABLE} data.target=load"),
        }
        for recipe, text in shipped().items():
            if not fnmatch(recipe, f"*{asked.only}*"):
                continue
            settings = []
            if (source := sources.get(loader(text))) is not None:
                folder, make, words = source
                if folder is None:
                    folder = Path(made) / recipe
                    folder.mkdir()
                    make(folder)
                settings = words.format(folder).split()
            entries.append(compare(recipe, settings, asked.rounds))
            show(entries[-1])
    merge(asked.output, entries, shipped(), asked.rounds)


if __name__ == "__main__":
    main()
