"""Every error that a user can meet, with the exit status that the command line gives it."""

from __future__ import annotations

from collections.abc import Sequence


class FwdlearnError(Exception):
    """A message written for the user: what, where, the rule, a way out."""

    exit_code = 1


class UsageError(FwdlearnError, ValueError):
    """A setting, an argument or a combination of them that cannot work."""

    exit_code = 2


class RecipeError(FwdlearnError):
    """A recipe with one or more problems, one line each.

    Args:
        problems: lines of the form `file:line:column: dotted.key: what is wrong; the way out`.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class MissingError(FwdlearnError):
    """Data, a model or an optional package is not there."""

    exit_code = 3


class NonFiniteError(FwdlearnError):
    """Losses or weights are no longer finite, or training has diverged."""

    exit_code = 4


class StorageError(FwdlearnError):
    """A file could not be written or read back."""

    exit_code = 5


class BackwardError(FwdlearnError, RuntimeError):
    """Something asked for a backward pass where only forward passes run."""
