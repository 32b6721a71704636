"""Exact gradients without stored activations, by inverse-forward differentiation.

A `Chain` of layers knows its structure; `Moonwalk` walks along it. `walk.py` holds the method and
what it costs, `layer.py` what a layer must offer, `rank.py` what to do where a layer erases.
"""

from fwdlearn.moonwalk.activation import LeakyReLU, ReLU, Tanh
from fwdlearn.moonwalk.build import cnn, mlp
from fwdlearn.moonwalk.chain import Chain
from fwdlearn.moonwalk.convolution import CausalConv1d, Conv2d, Patches2d
from fwdlearn.moonwalk.cotangent import output_cotangent
from fwdlearn.moonwalk.coupling import Coupling
from fwdlearn.moonwalk.layer import Layer
from fwdlearn.moonwalk.linear import Dense, Orthogonal, Permutation, Reshape
from fwdlearn.moonwalk.oracle import ChainOracle, GradientOracle
from fwdlearn.moonwalk.pooling import MaxPool2d, MeanPool2d
from fwdlearn.moonwalk.walk import Moonwalk, Walk

__all__ = [
    "CausalConv1d",
    "Chain",
    "ChainOracle",
    "Conv2d",
    "Coupling",
    "Dense",
    "GradientOracle",
    "Layer",
    "LeakyReLU",
    "MaxPool2d",
    "MeanPool2d",
    "Moonwalk",
    "Orthogonal",
    "Patches2d",
    "Permutation",
    "ReLU",
    "Reshape",
    "Tanh",
    "Walk",
    "cnn",
    "mlp",
    "output_cotangent",
]
