"""Nested plain values as JSON and tensors, and back: what a state may consist of. No pickle."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

_PLAIN = (bool, int, str, type(None))


def pack(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """What stands for a value in JSON.

    Args:
        value: tensors, numbers, text, None, and dicts, lists, tuples and dataclasses of them.
        tensors: is filled: place -> tensor.
        place: where the value stands; it names its tensors.

    Raises:
        TypeError: there is something else in it.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, float):
        # As text, because JSON has neither infinities nor nan.
        return {"float": float(value).hex()}
    if isinstance(value, Tensor):
        if place in tensors:
            raise TypeError(f"two tensors would be called {place}")
        tensors[place] = value.detach()
        return {"tensor": place}
    if type(value) in (list, tuple):
        parts = [pack(part, tensors, f"{place}/{i}") for i, part in enumerate(value)]
        return {type(value).__name__: parts}
    if isinstance(value, Mapping):
        parts = []
        for key, part in value.items():
            if not isinstance(key, bool | int | float | str | None):
                raise TypeError(f"{place} has a key that is {type(key).__name__}")
            parts.append([pack(key, tensors, place), pack(part, tensors, f"{place}/{key}")])
        return {"dict": parts}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        parts = [[n, pack(getattr(value, n), tensors, f"{place}/{n}")] for n in fields]
        return {"of": f"{kind.__module__}:{kind.__qualname__}", "fields": parts}
    raise TypeError(
        f"{place} is {type(value).__name__}; only tensors, numbers, text, None, and dicts, lists, "
        "tuples and dataclasses of them can be kept"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor], packages: Collection[str]) -> Any:
    """The value again.

    Args:
        packed: from `pack`.
        tensors: by place.
        packages: top-level ones whose dataclasses may be made; nothing is imported.

    Raises:
        ValueError: it is not what `pack` gives, or has a dataclass of another package.
    """
    if type(packed) in _PLAIN:
        return packed
    if not isinstance(packed, dict) or not packed:
        raise ValueError(f"{packed!r} stands for nothing")
    kind, content = next(iter(packed.items()))
    if kind == "float":
        return float.fromhex(content)
    if kind == "tensor":
        return tensors[content]
    if kind in ("list", "tuple"):
        parts = [unpack(part, tensors, packages) for part in content]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict":
        return {unpack(k, tensors, packages): unpack(v, tensors, packages) for k, v in content}
    if kind == "of":
        made = _dataclass(content, packages)
        return made(**{name: unpack(v, tensors, packages) for name, v in packed["fields"]})
    raise ValueError(f"{kind!r} stands for nothing")


def _dataclass(name: str, packages: Collection[str]) -> Any:
    module, _, path = name.partition(":")
    found: Any = None
    if module.partition(".")[0] in packages:
        found = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{name} is no dataclass of {', '.join(sorted(packages))}")
    return found
