"""The pages: listed, linked to what is there, their code runs and their recipes are read."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fwdlearn.compare.methods import plan
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.locate import shipped
from fwdlearn.recipe.text import parse

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READERS = dict.fromkeys(("train", "validate", "explain", "tune"), load_recipe) | {"compare": plan}


# What the code of a page prints, where that says whether it works.
PRINTS: dict[str, Callable[[str], bool]] = {
    # The loss starts at 0.32.
    "black-box.md": lambda text: float(text.split()[0]) < 0.05,
    # The layer that it went back to is the one it came from, and the unrolled one to rounding.
    "recurrent.md": lambda text: text.startswith("True True\nTrue tensor([0.0000,"),
}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def name(page: Path) -> str:
    return page.name


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w.-]+\.md)\)", (DOCS / "README.md").read_text("utf-8")))
    assert linked == {page.name for page in PAGES} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The blocks of a page, one after the other as one program; ```py is for what cannot run."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    before = torch.get_rng_state()
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), vars(module))
    printed = capsys.readouterr().out
    assert PRINTS.get(page.name, lambda text: True)(printed), printed
    assert torch.equal(torch.get_rng_state(), before), "examples use keys, not global generators"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_is_read(page: Path) -> None:
    for text in blocks(page, "yaml"):
        source, problems = parse(text, page.name)
        assert not problems and isinstance(source.data, dict), problems


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_on_shipped_recipes_are_right(page: Path) -> None:
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        given = [word for word in words[3:] if not word.startswith("-")]
        # Modules of the reader's own are not here, nor is their data.
        if len(words) < 3 or words[2] not in shipped() or re.search("=FOLDER|my[a-z]+\\.", line):
            continue
        assert words[0] == "fwdlearn"
        READERS[words[1]](words[2], given)
