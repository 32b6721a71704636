"""Handwritten digits, one pixel a step: the class is asked after the last of 64 pixels."""

from __future__ import annotations

from dataclasses import replace

from fwdlearn.data.digits import digits
from fwdlearn.data.types import Data, Dataset, Rows


def sequential_digits(test_fraction: float = 0.2, split_seed: int = 0) -> Data:
    """Loads the digits of `digits` as sequences; nothing is downloaded.

    Args:
        test_fraction: share of each class held out for evaluation, above 0 and below 1.
        split_seed: of the split alone, so that runs with other seeds share the same test rows.

    Returns:
        Pixels float32 [64, 1] with values 0 to 1, row after row of the image; targets 0 to 9.

    Raises:
        MissingError: scikit-learn is not installed.
        UsageError: `test_fraction` is out of range.
    """
    data = digits(test_fraction, split_seed)

    def unrolled(dataset: Dataset | None) -> Rows:
        assert isinstance(dataset, Rows)
        return replace(dataset, inputs=dataset.inputs.flatten(1).unsqueeze(2))

    info = replace(data.info, kind="sequence", shape=(64, 1))
    return Data(info, unrolled(data.train), unrolled(data.evaluation))
