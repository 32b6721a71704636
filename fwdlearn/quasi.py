"""Quasi-random noise for the outputs of layers: normal points that fill space evenly.

Papers: I. M. Sobol, "On the distribution of points in a cube" (1967); A. B. Owen, "Randomly
permuted (t, m, s)-nets" (1995), the scrambling, which makes every point uniform by itself, so that
means are unbiased.

Every noisy number is a dimension. Points are spread out evenly where there are as many of them as
dimensions or so; in thousands of dimensions tens of points are no better than random ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch

from fwdlearn.errors import UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import GivenNoise, Output

# Of scipy's direction numbers (Joe and Kuo, 2008).
DIMENSIONS = 21201


def sobol_noise(
    key: Key,
    sites: Mapping[str, Output],
    count: int,
    scales: Mapping[str, float] | None,
    only: Collection[str],
    device: torch.device | str = "cpu",
) -> GivenNoise:
    """Scrambled Sobol points as standard normal numbers; consecutive ones lie far apart.

    Held in memory, unlike drawn noise: `count` times the number of noisy numbers of a row.

    Args:
        key: names the scrambling.
        sites: name -> `Output`, from the oracle.
        count: how many points.
        scales: name -> size of the noise there; 1 where a name is missing.
        only: the layers that get noise.
        device: where the numbers go.

    Raises:
        UsageError: a row has more than 21201 noisy numbers.
    """
    # Slow to import, and needed here alone.
    from scipy.special import ndtri
    from scipy.stats import qmc

    names = [name for name in sites if name in only]
    sizes = [math.prod(sites[name].shape) for name in names]
    if sum(sizes) > DIMENSIONS:
        raise UsageError(
            f"Sobol points have {DIMENSIONS} dimensions at most, but the noise of a row has "
            f"{sum(sizes)} numbers here; perturb fewer layers at once, or use the law 'rademacher'."
        )
    generator = np.random.default_rng([key.low, key.high])
    # A power of two is drawn whole: scipy warns of the loss of balance in any other number.
    power = max(0, math.ceil(math.log2(max(1, count))))
    points = qmc.Sobol(sum(sizes), scramble=True, seed=generator).random_base2(power)[:count]
    # Half a step off the grid keeps the quantile finite.
    normal = torch.from_numpy(ndtri(points.clip(2.0**-33, 1 - 2.0**-33)))
    values = {}
    for name, part in zip(names, normal.split(sizes, 1), strict=True):
        dtype = torch.promote_types(sites[name].dtype, torch.float32)
        values[name] = part.to(device, dtype).reshape(count, *sites[name].shape)
    return GivenNoise(values, scales)
