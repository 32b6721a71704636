"""Three hundred recipes with one thing wrong, made from every key: each gets its line.

The recipe that they are made of has every key of the schema, as `fwdlearn validate` shows it. Keys
and names are misspelt by one edit, values are of another kind, and lines are broken as hands break
them. The seed is fixed, and so is what is counted.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fwdlearn.errors import RecipeError
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.schema import SECTIONS, CompareSection, OutputSection, TrainerSection

START = """\
model: {name: mlp, hidden: [8]}
data: {name: digits}
objective: {name: cross_entropy, label_smoothing: 0.1}
estimator: {name: LikelihoodRatio, sigma: 0.1}
allocator: {name: AdaptiveDirections, directions: 4}
optimizer:
  name: Adam
  lr: 1e-3
  schedule: {name: CosineAnnealingLR, eta_min: 1e-5}
  groups:
    "layers.0.*": {lr: 1e-4}
trainer: {batch_size: 16, steps: 5}
output: {dir: here}
tracking: {wandb: {project: digits}}
metrics: [{name: accuracy}]
compare: {seeds: [0, 1]}
seed: 1
"""
COUNT = 300
# Of names and keys with one wrong, missing, additional or exchanged letter, those that must get the
# right suggestion.
SHARE = 0.95
LINE = re.compile(r"^( *)([\w.*]+|\"[^\"]+\"|'[^']+'):(?: (.*))?$")
# Keys that are the user's own words.
OWN = re.compile(r"[\"'*]")


@dataclass(frozen=True)
class Mistake:
    """A recipe with one thing wrong.

    Args:
        text: of the recipe.
        line: where it is wrong, from 1.
        column: the same, None where it is for the message to choose.
        meant: what was misspelt, or None.
        what: was done, for people.
    """

    text: str
    line: int
    column: int | None
    meant: str | None
    what: str


def _misspelt(word: str, chance: random.Random) -> str:
    """One letter wrong, missing, additional or exchanged with the next one."""
    letters, place = "abcdefghijklmnopqrstuvwxyz_", chance.randrange(len(word))
    kind = chance.choice(("drop", "add", "change", "swap"))
    if kind == "drop" and len(word) > 2:
        return word[:place] + word[place + 1 :]
    if kind == "add":
        return word[:place] + chance.choice(letters) + word[place:]
    if kind == "swap" and place + 1 < len(word) and word[place] != word[place + 1]:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    other = chance.choice([letter for letter in letters if letter != word[place]])
    return word[:place] + other + word[place + 1 :]


def _mistakes(full: str, chance: random.Random) -> Iterator[Mistake]:
    """Every key, in every way."""
    lines = full.splitlines()
    keys = {found[2] for line in lines if (found := LINE.match(line))}
    for number, line in enumerate(lines):
        found = LINE.match(line)
        if found is None or OWN.search(found[2]):
            continue
        indent, key, value = found[1], found[2], found[3]
        column, rest = len(indent) + 1, line[len(indent) + len(key) :]

        def made(*new: str, at: int = number + 1, **more: Any) -> Mistake:
            text = "\n".join([*lines[:number], *new, *lines[number + 1 :], ""])  # noqa: B023
            what = f"line {number + 1}, {key}: {list(new)}"  # noqa: B023
            return Mistake(text, at, more.get("column"), more.get("meant"), what)

        for _ in range(2):
            typo = _misspelt(key, chance)
            if typo not in keys:
                yield made(indent + typo + rest, column=column, meant=key)
        yield made("\t" + line, column=1)
        if value is None:
            continue
        yield made(line, line, at=number + 2, column=column)
        place = column + len(key) + 2
        if key == "name" and len(value) > 3:
            for _ in range(3 if value != "null" else 0):
                typo = _misspelt(value, chance)
                yield made(f"{indent}name: {typo}", column=place, meant=value)
        for wrong in ("[{}]", "&a 1", ".inf", "!!int 1"):
            # In a list it is the item that is wrong.
            item = wrong == "[{}]" and key in ("seeds", "lrs")
            yield made(f"{indent}{key}: {wrong}", column=place + item)
        yield made(f"{indent}{key}: {{", at=0)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe with every key."""
    path = tmp_path_factory.mktemp("full") / "r.yaml"
    path.write_text(START)
    text = load_recipe(str(path)).to_yaml()
    path.write_text(text)
    load_recipe(str(path))
    return text


def test_every_key_is_there(full: str) -> None:
    found = {match[2] for line in full.splitlines() if (match := LINE.match(line))}
    sections = (TrainerSection, OutputSection, CompareSection)
    wanted = {*SECTIONS, *(name for section in sections for name in section.model_fields)}
    assert wanted <= found


def test_three_hundred_malformed_recipes(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    every = list(_mistakes(full, chance))
    path, misspelt, missed, wrong = Path("r.yaml"), 0, [], []
    for mistake in chance.sample(every, COUNT):
        path.write_text(mistake.text)
        with pytest.raises(RecipeError) as caught:
            load_recipe("r.yaml")
        assert caught.value.exit_code == 2
        said = str(caught.value).splitlines()
        if not all(re.match(r"r\.yaml:\d+:\d+: .+", line) for line in said):
            wrong.append((mistake.what, said))
        column = r"\d+" if mistake.column is None else mistake.column
        place = re.compile(rf"r\.yaml:{mistake.line}:{column}: ")
        here = [line for line in said if place.match(line)]
        if mistake.line and not here:
            wrong.append((mistake.what, said))
        if mistake.meant is not None:
            misspelt += 1
            # A key of another section is meant by its whole name.
            if not any(f"{mistake.meant}'?" in line for line in here):
                missed.append((mistake.what, here))
    assert not wrong
    assert misspelt > COUNT // 4
    assert 1 - len(missed) / misspelt >= SHARE, missed


def test_on_the_command_line_too(full: str, tmp_path: Path) -> None:
    chance = random.Random(1)
    for number, mistake in enumerate(chance.sample(list(_mistakes(full, chance)), 3)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(mistake.text)
        command = [sys.executable, "-m", "fwdlearn", "train", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith(f"{path}:") and "Traceback" not in done.stderr
