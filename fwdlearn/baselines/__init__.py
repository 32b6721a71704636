"""What forward passes are compared with. Backward passes run here and nowhere else."""

from fwdlearn.baselines.backpropagation import (
    Backpropagation,
    BaselineTrainer,
    GradientOracle,
    ReverseOracle,
    is_baseline,
)

__all__ = ["Backpropagation", "BaselineTrainer", "GradientOracle", "ReverseOracle", "is_baseline"]
