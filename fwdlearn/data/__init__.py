"""Data: each loader is a plain function returning `Data`; its arguments are recipe keys."""

from fwdlearn.data.csv import csv
from fwdlearn.data.digits import digits
from fwdlearn.data.idx import idx
from fwdlearn.data.image_folder import image_folder
from fwdlearn.data.jsonl import jsonl
from fwdlearn.data.npz import npz
from fwdlearn.data.sequential_digits import sequential_digits
from fwdlearn.data.types import Data, DataInfo, Dataset, Rows, TextRows, TokenRows

__all__ = [
    "Data",
    "DataInfo",
    "Dataset",
    "Rows",
    "TextRows",
    "TokenRows",
    "csv",
    "digits",
    "idx",
    "image_folder",
    "jsonl",
    "npz",
    "sequential_digits",
]
