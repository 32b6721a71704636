"""The allocators that come with fwdlearn, one family per file."""

if __name__ == "allocators":
    raise ImportError(
        "import fwdlearn.allocators: under its bare name every class would exist twice"
    )

from .confidence_skip import ConfidenceSkip
from .learned import BernoulliAllocator, GaussianAllocator
from .neyman import Neyman
from .uniform import Uniform

__all__ = ["BernoulliAllocator", "ConfidenceSkip", "GaussianAllocator", "Neyman", "Uniform"]
