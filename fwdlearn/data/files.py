"""Opening what the user names, with errors that say where and what to do."""

from __future__ import annotations

from pathlib import Path

from fwdlearn.errors import MissingError, UsageError


def existing(path: str | Path, argument: str, expected: str) -> Path:
    """The path, if there is something at it.

    Args:
        path: as the user gave it; `~` is the home folder.
        argument: whose value it is, as in `csv(path=...)`.
        expected: what belongs there, for the message.

    Raises:
        MissingError: nothing is there.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise MissingError(
            f"{argument}: there is no {found}. It must be {expected}; relative paths start from "
            f"{Path.cwd()}."
        )
    return found


def existing_file(path: str | Path, argument: str, expected: str) -> Path:
    """Like `existing`, and no folder."""
    found = existing(path, argument, expected)
    if found.is_dir():
        raise UsageError(f"{argument}: {found} is a folder; it must be {expected}.")
    return found


def text_of(path: Path) -> str:
    """The whole file as UTF-8 text, with or without a byte order mark.

    Raises:
        UsageError: the file is not UTF-8, cannot be read, or is empty.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: byte {error.start} is not UTF-8 text; save the file as UTF-8."
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    if not text.strip():
        raise UsageError(f"{path}: the file is empty; it must hold at least one row.")
    return text
