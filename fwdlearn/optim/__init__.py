"""Optimizers of our own, as `torch.optim.Optimizer`s that read `.grad`."""

from fwdlearn.optim.frank_wolfe import FrankWolfe

__all__ = ["FrankWolfe"]
