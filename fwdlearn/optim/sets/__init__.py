"""Constraint sets: linear minimisation oracle, diameter, membership, projection."""

from fwdlearn.optim.sets.base import Ball, ConstraintSet
from fwdlearn.optim.sets.box import Box
from fwdlearn.optim.sets.matrices import NuclearBall, SpectralBall
from fwdlearn.optim.sets.norms import L1Ball, L2Ball, LInfBall, LpBall
from fwdlearn.optim.sets.product import Product
from fwdlearn.optim.sets.simplex import Simplex
from fwdlearn.optim.sets.sparse import KSparsePolytope
from fwdlearn.optim.sets.vertex import Dense, Entries, Multiple, Outer, Vertex

__all__ = [
    "Ball",
    "Box",
    "ConstraintSet",
    "Dense",
    "Entries",
    "KSparsePolytope",
    "L1Ball",
    "L2Ball",
    "LInfBall",
    "LpBall",
    "Multiple",
    "NuclearBall",
    "Outer",
    "Product",
    "Simplex",
    "SpectralBall",
    "Vertex",
]
