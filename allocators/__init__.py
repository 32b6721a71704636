"""The allocators that come with fwdlearn, one family per file."""

if __name__ == "allocators":
    raise ImportError(
        "import fwdlearn.allocators: under its bare name every class would exist twice"
    )

from .uniform import Uniform

__all__ = ["Uniform"]
