"""Annotations, as far as YAML can express them: checking values, and saying what is expected."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from fwdlearn.registry import nearest

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}
_LISTS = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)


def expressible(annotation: Any) -> Any:
    """The part of an annotation that YAML can write, or None if there is none.

    `float | Tensor` becomes `float`; a bare class such as `Tensor` becomes None.
    """
    if annotation in _WORDS or annotation is Any or get_origin(annotation) is Literal:
        return annotation
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return annotation if expressible(inner[0]) is not None else None
    if origin in (Union, types.UnionType):
        kept = tuple(part for part in map(expressible, inner) if part is not None)
        return Union[kept] if kept else None  # noqa: UP007 (a union of a computed tuple)
    if origin in _LISTS:
        kept = tuple(part if part is ... else expressible(part) for part in inner)
        if None in kept:
            return None
        return (tuple if origin is tuple else list).__class_getitem__(kept)
    if origin in _MAPPINGS:
        kept = tuple(map(expressible, inner))
        return None if None in kept else dict.__class_getitem__(kept)
    return None


def convert(annotation: Any, value: Any) -> Any:
    """The value as the annotation wants it (lists become tuples, integers floats).

    Raises:
        ValueError: what is expected instead, and where in a list.
    """
    annotation = expressible(annotation)
    if annotation is None or annotation is Any:
        return value
    try:
        config = ConfigDict(strict=True, allow_inf_nan=False)
        # As JSON, because there strict pydantic takes a list for a tuple and text for a path.
        return TypeAdapter(annotation, config=config).validate_json(json.dumps(value))
    except PydanticUserError:
        return value
    except ValidationError as error:
        raise ValueError(_mismatch(annotation, value, error)) from None


def words(annotation: Any) -> str:
    """What the annotation expects, as a person would say it."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(inner[0])
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(words(part) for part in inner)
    if origin is tuple and inner and inner[-1] is not ...:
        return f"a list of {len(inner)}: " + ", ".join(words(part) for part in inner)
    if origin in _LISTS and inner:
        return "a list, each " + words(inner[0])
    if origin in _MAPPINGS:
        return "a mapping"
    return "anything"


def shown(value: Any) -> str:
    """A value as messages quote it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    if isinstance(value, str):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _mismatch(annotation: Any, value: Any, error: ValidationError) -> str:
    rule = f"must be {words(annotation)}, got {shown(value)}"
    first = error.errors(include_url=False)[0]
    if "ctx" in first and first["type"].startswith(("greater", "less")):
        limit = first["msg"].removeprefix("Input should be ")
        return f"must be {limit}, got {shown(value)}"
    if isinstance(value, str):
        choices = [choice for choice in _choices(annotation) if isinstance(choice, str)]
        near = nearest(value, choices)
        return f"{rule}; did you mean {near!r}?" if near else rule
    return rule


def _choices(annotation: Any) -> Sequence[Any]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return inner
    if origin in (Union, types.UnionType):
        return [choice for part in inner for choice in _choices(part)]
    return []
