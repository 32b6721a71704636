"""Where a pretrained model lies: a folder, a folder inside an installed package, or the hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fwdlearn.errors import MissingError, UsageError

_PACKAGE = "package:"
_WAY_OUT = (
    "a folder written by save_pretrained, package:NAME/FOLDER for one inside an installed Python "
    "package, or a model's name on the hub"
)


def local_folder(path: str) -> Path | None:
    """The folder that `path` names, or None where it can only be a name on the hub.

    Args:
        path: a folder, `package:NAME/FOLDER`, or a name such as `org/model`.

    Raises:
        MissingError: the package is not installed or has no such folder, or `path` can only be a
            local one and is not there.
        UsageError: `path` is empty, or a file.
    """
    if not path.strip():
        raise UsageError(f"transformers(path=...) must be {_WAY_OUT}; got {path!r}.")
    if path.startswith(_PACKAGE):
        return _with_config(_inside_package(path), path)
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UsageError(f"transformers(path=...): {folder} is a file; give {_WAY_OUT}.")
    if folder.is_dir():
        return _with_config(folder, path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise MissingError(f"transformers(path=...): there is no folder {folder}; give {_WAY_OUT}.")
    return None


def _inside_package(path: str) -> Path:
    name, _, subfolder = path.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier():
        raise UsageError(
            f"transformers(path=...) must be package:NAME/FOLDER with NAME as in `import NAME`, "
            f"got {path!r}."
        )
    # A top-level name is only looked for here; nothing of the package runs.
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(
            f"transformers(path=...): the package {name} is not installed: "
            f"pip install {name.replace('_', '-')}."
        )
    for location in spec.submodule_search_locations:
        folder = Path(location) / subfolder
        if folder.is_dir():
            return folder
    raise MissingError(
        f"transformers(path=...): the package {name} has no folder {subfolder!r}; it lies at "
        f"{next(iter(spec.submodule_search_locations))}."
    )


def _with_config(folder: Path, path: str) -> Path:
    if not (folder / "config.json").is_file():
        raise MissingError(
            f"transformers(path=...): {path} has no config.json, so it is no model; give "
            f"{_WAY_OUT}."
        )
    return folder
