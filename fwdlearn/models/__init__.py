"""Models: each factory takes the data's `info` and its recipe's keys and returns `Built`."""

from fwdlearn.models.built import Built
from fwdlearn.models.mlp import mlp

__all__ = ["Built", "mlp"]
