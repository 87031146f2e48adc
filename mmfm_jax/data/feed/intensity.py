"""The window of a volume by its own intensities, for images without a unit, such as MRI.

It is that of the whole volume and not of the crop, and no volume is read for it: the intensities at 2,048 even places
of each image were kept when the store was written (`store/foreground.py`). So it costs the host a read of some
kilobytes an image, whatever the image's size, and any store that has those samples will do.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

from mmfm_jax.config.inputs import ZScore

DEVIATIONS = 4.0
"""Of a z-score, from the middle to either end of [0, 1]."""
SMALLEST = 1e-6
"""Width of a window over the size of its ends, below which float32 would hardly tell them apart."""


def own_limits(
    intensities: Shaped[np.ndarray, "place"], normalise: tuple[float, float] | ZScore
) -> tuple[float, float]:
    """Raw values of a volume that map to 0 and 1, low < high, from a sample of its intensities.

    Two percentiles, or the mean less and plus DEVIATIONS standard deviations: of all of it, or with `zscore_foreground`
    of what is above its smallest value. nnU-Net (doi:10.1038/s41592-020-01008-z) takes what is not 0, if cropping to it
    makes the images of a data set smaller by a quarter; that is the same where air was set to 0. What is not finite
    does not count. A volume of one value is 0 throughout.

    From 2,048 places a mean is known to 2 % of a deviation, and the share of the volume below its 0.5th percentile to
    0.16 % of the volume (one standard error of places at random; even ones do better).
    """
    values = np.asarray(intensities, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    if isinstance(normalise, tuple):
        low, high = np.percentile(values, normalise)
    else:
        above = values[values > values.min()]
        counted = above if normalise == "zscore_foreground" and len(above) else values
        mean, reach = counted.mean(), DEVIATIONS * counted.std()
        low, high = mean - reach, mean + reach
    least = SMALLEST * max(abs(low), abs(high))
    return float(low), float(high if high - low > least else low + max(1.0, least))
