"""A bounded sample of the intensities of an image, by which its foreground is found without reading a volume.

The intensities at SAMPLED even places of each image are kept when the store is written; which of those are foreground
is decided when they are read, so the threshold may change and the store may stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAMPLED = 2048
"""Places of an image whose intensity is kept: one that fills a hundredth of it has some twenty of them."""
_STEP = 0.8191725133961645, 0.6710436067037893, 0.5497004779019703
"""Of the sequence R3 (M. Roberts, 2018): powers -1, -2, -3 of the root of x^4 = x + 1, which spread points evenly."""
_BINS = 256


def places(shape: Sequence[int]) -> np.ndarray:
    """SAMPLED places z y x of a volume of that shape, int64 [place, 3], evenly spread and always the same."""
    at = (0.5 + np.arange(1, SAMPLED + 1)[:, None] * _STEP) % 1
    return (at * shape).astype(np.int64)


def intensities(voxels: np.ndarray) -> np.ndarray:
    """Of voxels [z, y, x, channel], the largest channel at each of `places`, in their dtype."""
    return voxels[tuple(places(voxels.shape[:3]).T)].max(-1)


def otsu(values: np.ndarray) -> float:
    """The value that parts `values` in two classes with the largest variance between them (Otsu, 1979).

    In 256 bins between the percentiles 0.5 and 99.5, so that a few extreme voxels do not take all of them.
    """
    low, high = np.percentile(values, (0.5, 99.5))
    if low >= high:
        return float(low)
    counts, edges = np.histogram(np.clip(values, low, high), _BINS, (low, high))
    middle, below = (edges[:-1] + edges[1:]) / 2, np.cumsum(counts)[:-1]
    above, sums = counts.sum() - below, np.cumsum(counts * middle)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    best = np.flatnonzero(between == np.nanmax(between))
    return float(edges[1:-1][best].mean())  # the middle of a gap that holds nothing
