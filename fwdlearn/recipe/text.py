"""YAML as recipes use it: the scalars of YAML 1.2's core schema and nothing surprising.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is a boolean, `012` is ten, `1:30` is
ninety and the last of two equal keys wins. Here `1e-4` is a float, `no` is a string, `012` is
twelve, `1:30` is a string and equal keys are an error. Anchors, aliases, tags, infinities and
very large or deep files are refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from fwdlearn.recipe.source import Path, Problem, Source

MOST_CHARACTERS = 256 * 1024
MOST_NODES = 10_000
MOST_LEVELS = 20

_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Refused(yaml.MarkedYAMLError):
    """Well-formed YAML that recipes do not use."""


class _Loader(yaml.SafeLoader):
    """Composes nodes only; `_plain` turns them into values."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    nodes = 0
    level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _Refused(None, None, "anchors and aliases are not used; repeat it", _at(event))
        if getattr(event, "tag", None) is not None:
            raise _Refused(None, None, f"the tag {event.tag} is not used; leave it out", _at(event))
        self.nodes += 1
        self.level += 1
        if self.nodes > MOST_NODES:
            rule = f"more than {MOST_NODES} values; a recipe is a page of settings"
            raise _Refused(None, None, rule, _at(event))
        if self.level > MOST_LEVELS:
            rule = f"nested more than {MOST_LEVELS} levels deep; flatten it"
            raise _Refused(None, None, rule, _at(event))
        try:
            return super().compose_node(parent, index)
        finally:
            self.level -= 1


for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(f"(?:{_pattern})\\Z"),
        [character if character != "\0" else "" for character in _first],
    )


def parse(text: str, name: str) -> tuple[Source, list[Problem]]:
    """Reads one document, whatever its top level is, with all problems that can be told."""
    source = Source(name, text)
    problems: list[Problem] = []
    if len(text) > MOST_CHARACTERS:
        limit = MOST_CHARACTERS // 1024
        return source, [Problem((), f"larger than {limit} KiB; a recipe is a page of settings")]
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if mark is not None:
            source.values[()] = (mark.line + 1, mark.column + 1)
        return source, [Problem((), _explain(error))]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        source.values[()] = (line, column)
        return source, [Problem((), f"the character U+{_code(error):04X} is not allowed in YAML")]
    if node is not None:
        source.data = _plain(node, (), source, problems)
    else:
        source.data = None  # type: ignore[assignment]
    return source, problems


def dump(data: Any) -> str:
    """Plain values as YAML that reads back to the same, here and with YAML 1.1 readers."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that either version of YAML would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_list(self, data: list[Any]) -> yaml.Node:  # type: ignore[override]
        flat = not any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)

    def represent_text(self, data: str) -> yaml.Node:
        # PyYAML takes these for line breaks, and loses them anywhere but in double quotes.
        style = '"' if set(data) & set("\x85\u2028\u2029\ufeff\r\n") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


for _tag, (_pattern, _first) in _SCALARS.items():
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(f"(?:{_pattern})\\Z"),
        [character if character != "\0" else "" for character in _first],
    )
_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_text)


def _plain(node: yaml.Node, path: Path, source: Source, problems: list[Problem]) -> Any:
    source.values[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), source, problems) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, problems)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value
        mark = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(Problem(path, "keys are words, not lists or mappings", mark=mark))
        elif not key_node.tag.endswith(":str"):
            problems.append(Problem(path, f"keys are words; the key {key} is not", mark=mark))
        elif key in mapping:
            first = source.keys[(*path, key)][0]
            message = f"given twice (first on line {first}); keep one"
            problems.append(Problem((*path, key), message, mark=mark))
        else:
            source.keys[(*path, key)] = mark
            mapping[key] = _plain(value_node, (*path, key), source, problems)
    return mapping


def _scalar(node: yaml.ScalarNode, path: Path, problems: list[Problem]) -> Any:
    text, kind = node.value, node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        if len(text) > 40:
            problems.append(Problem(path, "an integer of more than 40 digits"))
            return 0
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text[2:] if base != 10 else text, base)
    if kind == "float":
        value = float(text) if text[-1] in "0123456789." else math.nan
        if not math.isfinite(value):
            problems.append(Problem(path, f"{text} is not a finite number; give a finite one"))
            return 0.0
        return value
    return text


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    if "'\\t'" in problem:
        return "a tab where YAML needs spaces; indent with spaces"
    if isinstance(error, _Refused):
        return problem
    if "but found another document" in problem:
        return "a second document starts here; a recipe is one document, remove the ---"
    context = f" ({error.context})" if error.context else ""
    return f"not well-formed YAML: {problem}{context}; check indentation, colons and quotes"


def _code(error: yaml.reader.ReaderError) -> int:
    character = error.character
    return ord(character) if isinstance(character, str) else int(character)


def _at(event: yaml.Event) -> Any:
    return event.start_mark
