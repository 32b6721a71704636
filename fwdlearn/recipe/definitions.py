"""What a component's source says about it, read without importing it (so without torch)."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path


@dataclass(frozen=True)
class Definition:
    """A class or function as its file writes it.

    Args:
        summary: the first line of the docstring, or "".
        parameters: argument name -> whether it is required; None when the source alone does not
            tell (`**kwargs`, an unknown base class).
        is_function: a function rather than a class.
        needs: the oracle protocol of an estimator's traits, or "".
    """

    summary: str
    parameters: dict[str, bool] | None
    is_function: bool
    needs: str = ""


def definition(target: str) -> Definition | None:
    """The definition behind `module:attribute`, or None when its source is out of reach."""
    module, _, attribute = target.partition(":")
    try:
        return _find(module, attribute, 0)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _find(module: str, attribute: str, hops: int) -> Definition | None:
    tree = _tree(module)
    if tree is None or hops > 4:
        return None
    summary = ""
    found: ast.ClassDef | ast.FunctionDef | None = None
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            found = node
            summary = ast.get_docstring(node) or ""
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == attribute:
                    return _find(_absolute(node, module), alias.name, hops + 1)
    if found is None:
        return None
    if isinstance(found, ast.ClassDef):
        inherited = (_find(module, ast.unparse(base), hops + 1) for base in found.bases)
        needs = _needs(found) or next((base.needs for base in inherited if base), "")
        return Definition(_first_sentence(summary), _of_class(found), False, needs)
    return Definition(_first_sentence(summary), _of_function(found), is_function=True)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    sentence, dot, _ = paragraph.partition(". ")
    return sentence + "." if dot else paragraph


def _of_function(node: ast.FunctionDef) -> dict[str, bool] | None:
    arguments = node.args
    if arguments.kwarg is not None:
        return None
    plain = [*arguments.posonlyargs, *arguments.args]
    first_default = len(plain) - len(arguments.defaults)
    found = {argument.arg: i < first_default for i, argument in enumerate(plain)}
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[argument.arg] = default is None
    return found


def _of_class(node: ast.ClassDef) -> dict[str, bool] | None:
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            found = _of_function(part)
            return None if found is None else dict(list(found.items())[1:])
    is_dataclass = any("dataclass" in ast.unparse(part) for part in node.decorator_list)
    # Any other base may bring fields of its own.
    if not is_dataclass or {ast.unparse(base) for base in node.bases} - {"Estimator", "Allocator"}:
        return None
    fields: dict[str, bool] = {}
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            annotation = ast.unparse(part.annotation)
            value = ast.unparse(part.value) if part.value is not None else ""
            if "ClassVar" in annotation or "init=False" in value:
                continue
            has_default = bool(value) and not (
                value.startswith("field(") and "default" not in value
            )
            fields[part.target.id] = not has_default
    return fields


def _needs(node: ast.ClassDef) -> str:
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and ast.unparse(part.func) == "Traits":
            named = [keyword.value for keyword in part.keywords if keyword.arg == "needs"]
            return ast.unparse([*named, *part.args][0]) if named or part.args else ""
    return ""


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if node.level == 0:
        return node.module or ""
    spec = _spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


@lru_cache(maxsize=64)
def _tree(module: str) -> ast.Module | None:
    spec = _spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return ast.parse(Path(spec.origin).read_text("utf-8"))


@lru_cache(maxsize=64)
def _spec(module: str) -> ModuleSpec | None:
    # importlib.util.find_spec would import the parent packages, and with them torch.
    parts = module.split(".")
    path = None
    spec: ModuleSpec | None = None
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        found = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next((each for each in found if each is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec
