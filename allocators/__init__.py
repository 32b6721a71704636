"""The allocators that come with fwdlearn, one family per file."""

if __name__ == "allocators":
    raise ImportError(
        "import fwdlearn.allocators: under its bare name every class would exist twice"
    )

from .adaptive import AdaptiveDirections, MeasuredSharing
from .blocks import Blocks
from .confidence_skip import ConfidenceSkip
from .learned import BernoulliAllocator, GaussianAllocator
from .neyman import Neyman
from .uniform import Uniform

__all__ = [
    "AdaptiveDirections",
    "BernoulliAllocator",
    "Blocks",
    "ConfidenceSkip",
    "GaussianAllocator",
    "MeasuredSharing",
    "Neyman",
    "Uniform",
]
