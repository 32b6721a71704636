"""Optimizers of our own, as `torch.optim.Optimizer`s that read `.grad`."""

from fwdlearn.optim.frank_wolfe import FrankWolfe
from fwdlearn.optim.normalized_sgd import NormalizedSGD
from fwdlearn.optim.several import Several

__all__ = ["FrankWolfe", "NormalizedSGD", "Several"]
