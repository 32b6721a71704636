"""Imports run one way: algorithms -> interfaces, command line -> recipe -> registry -> names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERFACES = {
    f"fwdlearn.{name}"
    for name in (
        *("estimator", "allocator", "counts", "oracle", "directions", "laws", "factors"),
        *("noise", "given", "products"),
        *(
            "gradient",
            "keys",
            "errors",
            "quasi",
            "orthogonal",
            "balance",
            "differences",
            "coded",
            "shaped",
        ),
    )
}
ALGORITHMS = ("estimators", "allocators")
# What stands above the frame: it may import the frame, never the other way.
ABOVE = ("fwdlearn.recipe", "fwdlearn.cli", "fwdlearn.compare", "fwdlearn.registry")
# The modules that make up what stands above, and the program itself.
UPPER = ("recipe", "cli", "compare", "registry.py", "__main__.py")


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, inside functions too."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parts, node.module or ""]).strip(".") if node.level else node.module
            assert base is not None
            # `from fwdlearn import cli` imports a module too.
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def reaches(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files(*ALGORITHMS), ids=short)
def test_algorithms_import_interfaces_and_nothing_else(path: Path) -> None:
    if path.name == "__init__.py":
        # It lists its own files.
        own = {path.stem for path in path.parent.glob("*.py")}
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Import)
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module in own
        return
    allowed = INTERFACES | {"torch", "numpy", "scipy", "__future__"} | set(sys.stdlib_module_names)
    for name in imported(path):
        assert any(reaches(name, module) for module in allowed), f"{short(path)} imports {name}"


@pytest.mark.parametrize("path", files("fwdlearn"), ids=short)
def test_frame_imports_nothing_above_it(path: Path) -> None:
    parts = path.relative_to(ROOT / "fwdlearn").parts
    if parts[0] in UPPER:
        return
    for name in imported(path):
        assert not any(reaches(name, module) for module in ABOVE), f"{short(path)} imports {name}"


@pytest.mark.parametrize("path", files("fwdlearn"), ids=short)
def test_frame_names_no_algorithm(path: Path) -> None:
    for name in imported(path):
        for folder in ALGORITHMS:
            assert not reaches(name, f"fwdlearn.{folder}"), f"{short(path)} imports {name}"
            assert not reaches(name, folder), f"{short(path)} imports {name}"


@pytest.mark.parametrize("path", files("fwdlearn/recipe"), ids=short)
def test_recipe_does_not_know_the_command_line(path: Path) -> None:
    assert not any(reaches(name, "fwdlearn.cli") for name in imported(path))


def test_registry_imports_no_component() -> None:
    allowed = ("fwdlearn.errors", "__future__", *sys.stdlib_module_names)
    for name in imported(ROOT / "fwdlearn/registry.py"):
        assert any(reaches(name, module) for module in allowed), name


@pytest.mark.parametrize("folder", [*ALGORITHMS, "recipes"])
def test_bare_names_are_refused(folder: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert f"ImportError: import fwdlearn.{folder}: under its bare name" in run.stderr
