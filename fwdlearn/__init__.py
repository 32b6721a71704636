"""fwdlearn trains neural networks with forward passes only.

In a checkout this folder is the frame alone: `fwdlearn.estimators`, `fwdlearn.allocators` and
`fwdlearn.recipes` are the top-level folders of the same names (`setup.cfg` maps them).
"""

__version__ = "0.1.0"
