"""What forward passes are compared with. Backward passes run here and nowhere else."""

from fwdlearn.baselines.backpropagation import (
    Backpropagation,
    GradientOracle,
    TruncatedBackpropagation,
)
from fwdlearn.baselines.baseline import Baseline, is_baseline
from fwdlearn.baselines.oracle import ReverseOracle
from fwdlearn.baselines.reservoir import fit_readout, reservoir
from fwdlearn.baselines.ridge import RidgeReadout
from fwdlearn.baselines.trainer import BaselineTrainer

__all__ = [
    "Backpropagation",
    "Baseline",
    "BaselineTrainer",
    "GradientOracle",
    "ReverseOracle",
    "RidgeReadout",
    "TruncatedBackpropagation",
    "fit_readout",
    "is_baseline",
    "reservoir",
]
