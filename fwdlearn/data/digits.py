"""Handwritten digits: 1,797 images of 8 x 8 in 10 classes, inside the scikit-learn wheel."""

from __future__ import annotations

import numpy as np
import torch

from fwdlearn.data.split import held_out
from fwdlearn.data.types import Data, DataInfo, Rows
from fwdlearn.errors import MissingError


def digits(test_fraction: float = 0.2, split_seed: int = 0) -> Data:
    """Loads the digits; nothing is downloaded.

    Args:
        test_fraction: share of each class held out for evaluation, above 0 and below 1.
        split_seed: of the split alone, so that runs with other seeds share the same test rows.

    Returns:
        Images float32 [1, 8, 8] with values 0 to 1, targets 0 to 9.

    Raises:
        MissingError: scikit-learn is not installed.
        UsageError: `test_fraction` is out of range.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingError(
            'digits needs scikit-learn, which is not installed: pip install "fwdlearn[data]".'
        ) from error
    bunch = load_digits()
    images = torch.from_numpy((bunch.images / 16).astype(np.float32)).unsqueeze(1)
    targets = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = held_out(targets, test_fraction, split_seed, "digits(test_fraction=...)")
    labels = tuple(str(name) for name in bunch.target_names)
    info = DataInfo("image", (1, 8, 8), len(labels), labels)
    return Data(info, Rows(images[train], targets[train]), Rows(images[test], targets[test]))
