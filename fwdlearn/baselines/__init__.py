"""What forward passes are compared with. Backward passes run here and nowhere else."""

from fwdlearn.baselines.backpropagation import (
    Backpropagation,
    BaselineTrainer,
    GradientOracle,
    ReverseOracle,
    TruncatedBackpropagation,
    is_baseline,
)
from fwdlearn.baselines.reservoir import fit_readout, reservoir

__all__ = [
    "Backpropagation",
    "BaselineTrainer",
    "GradientOracle",
    "ReverseOracle",
    "TruncatedBackpropagation",
    "fit_readout",
    "is_baseline",
    "reservoir",
]
