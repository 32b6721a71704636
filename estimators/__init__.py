"""The estimators that come with fwdlearn, one family per file."""

if __name__ == "estimators":
    raise ImportError(
        "import fwdlearn.estimators: under its bare name every class would exist twice"
    )

from .activity_forward_gradient import ActivityForwardGradient
from .aim_zo import AIMZO
from .approximate_likelihood_ratio import ApproximateLikelihoodRatio
from .causal_node_perturbation import CausalNodePerturbation, PerturbationThroughTime
from .forward_gradient import ForwardGradient
from .hizoo import HiZOO
from .likelihood_ratio import LikelihoodRatio
from .lozo import LOZO
from .node_perturbation import (
    ActivityNodePerturbation,
    IterativeNodePerturbation,
    NodePerturbation,
)
from .projected_forward_gradient import ProjectedForwardGradient
from .random_perturbation import SPSA, RandomPerturbation
from .rtrl import RTRL
from .stepwise_perturbation import StepwiseActivityPerturbation, StepwiseWeightPerturbation

__all__ = [
    "AIMZO",
    "LOZO",
    "RTRL",
    "SPSA",
    "ActivityForwardGradient",
    "ActivityNodePerturbation",
    "ApproximateLikelihoodRatio",
    "CausalNodePerturbation",
    "ForwardGradient",
    "HiZOO",
    "IterativeNodePerturbation",
    "LikelihoodRatio",
    "NodePerturbation",
    "PerturbationThroughTime",
    "ProjectedForwardGradient",
    "RandomPerturbation",
    "StepwiseActivityPerturbation",
    "StepwiseWeightPerturbation",
]
