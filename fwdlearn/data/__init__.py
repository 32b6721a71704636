"""Data: each loader is a plain function returning `Data`; its arguments are recipe keys."""

from fwdlearn.data.digits import digits
from fwdlearn.data.types import Data, DataInfo, Dataset, Rows, TextRows, TokenRows

__all__ = ["Data", "DataInfo", "Dataset", "Rows", "TextRows", "TokenRows", "digits"]
