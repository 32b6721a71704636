"""The command line: `fwdlearn`, or `python -m fwdlearn`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from fwdlearn.errors import FwdlearnError

_EXPLAIN_UNEXPECTED = "this is not an error that fwdlearn knows; --debug shows where it comes from"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the words after `fwdlearn`; those of the process when not given.

    Returns:
        The exit status: 0 done, 1 unexpected, 2 recipe or usage, 3 something is not there, 4 not
        finite, 5 storage, 129, 130 and 143 interrupted.
    """
    from fwdlearn.cli.app import app

    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    failure: BaseException
    try:
        code = app(words, prog_name="fwdlearn", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except FwdlearnError as error:
        failure, message, code = error, str(error), error.exit_code
    except BrokenPipeError:
        # The reader has left; Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as error:
        failure, (message, code) = error, _translate(error)
    if debug:
        traceback.print_exception(failure)
    if message:
        print(message, file=sys.stderr)
    return code


def _translate(error: BaseException) -> tuple[str, int]:
    """A message, or nothing, and the exit status."""
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "interrupted", 130
    # Typer brings its own copy of click's classes from version 0.26 on, and click's before.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        text = " ".join(str(error.format_message()).split())
        return (f"fwdlearn: {text}; see fwdlearn --help" if text else ""), int(error.exit_code)
    if hasattr(error, "exit_code"):
        return str(error), int(error.exit_code)
    return f"{type(error).__name__}: {error}; {_EXPLAIN_UNEXPECTED}", 1
