"""Models: each factory takes the data's `info` and its recipe's keys and returns `Built`."""

from fwdlearn.models.built import Built
from fwdlearn.models.cnn import cnn
from fwdlearn.models.decorrelation import Decorrelation, decorrelated, fold_into_weights
from fwdlearn.models.images import ImageProcessor
from fwdlearn.models.mlp import mlp
from fwdlearn.models.prompted import prompted
from fwdlearn.models.recurrent import Recurrent, State, recurrent
from fwdlearn.models.transformers import transformers
from fwdlearn.models.unrolled import Unrolled, roll, unroll
from fwdlearn.models.vit import vit

__all__ = [
    "Built",
    "Decorrelation",
    "ImageProcessor",
    "Recurrent",
    "State",
    "Unrolled",
    "cnn",
    "decorrelated",
    "fold_into_weights",
    "mlp",
    "prompted",
    "recurrent",
    "roll",
    "transformers",
    "unroll",
    "vit",
]
