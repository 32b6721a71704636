"""Data: each loader is a plain function returning `Data`; its arguments are recipe keys."""

from fwdlearn.data.characters import characters
from fwdlearn.data.completions import chats, completions
from fwdlearn.data.corpus import corpus
from fwdlearn.data.csv import csv
from fwdlearn.data.csv_series import csv_series
from fwdlearn.data.digits import digits
from fwdlearn.data.idx import idx
from fwdlearn.data.image_folder import image_folder
from fwdlearn.data.jsonl import jsonl
from fwdlearn.data.label_words import label_words
from fwdlearn.data.mackey_glass import mackey_glass
from fwdlearn.data.multiple_choice import multiple_choice
from fwdlearn.data.npz import npz
from fwdlearn.data.sequence_tasks import adding_problem, copying_memory, delayed_recall
from fwdlearn.data.sequential_digits import sequential_digits
from fwdlearn.data.types import Data, DataInfo, Dataset, Rows, TextRows, TokenRows

__all__ = [
    "Data",
    "DataInfo",
    "Dataset",
    "Rows",
    "TextRows",
    "TokenRows",
    "adding_problem",
    "characters",
    "chats",
    "completions",
    "copying_memory",
    "corpus",
    "csv",
    "csv_series",
    "delayed_recall",
    "digits",
    "idx",
    "image_folder",
    "jsonl",
    "label_words",
    "mackey_glass",
    "multiple_choice",
    "npz",
    "sequential_digits",
]
