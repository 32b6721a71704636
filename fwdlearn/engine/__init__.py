"""How perturbed forward passes run: the fold, its reference, and the ladder between them."""

from fwdlearn.engine.ladder import RUNGS, Choice, Engine
from fwdlearn.engine.params import trainable

__all__ = ["RUNGS", "Choice", "Engine", "trainable"]
