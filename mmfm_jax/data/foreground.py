"""Where a share of training crops is centred, as nnU-Net does: on the foreground or on a class of a mask.

nnU-Net (doi:10.1038/s41592-020-01008-z) centres a third of its patches on a voxel of a class that the case holds. No
volume is read for that here. Places of each class of a mask are sampled when the store is written (`masks.py`), and so
are the intensities at SAMPLED even places of each image; which of those are foreground is decided when they are read,
so the threshold may change and the store may stay. A volume has a few kilobytes of either, whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmfm_jax.config import Foreground
from mmfm_jax.errors import UserError

if TYPE_CHECKING:
    from mmfm_jax.data.mix import StoreMix
    from mmfm_jax.data.store import StudyStore

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


def centre(
    config: Foreground, store: StudyStore | StoreMix, role: str, row: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Voxel z y x on which the crop of an image is centred, or None: anywhere, as chance or the image will have it."""
    if rng.random() >= config.share:
        return None
    if config.mask is None:
        found = store.foreground(role, row, config.above)
    else:
        voxels = store.mask_voxels(config.mask, row)
        held = np.flatnonzero([] if voxels is None else voxels)
        if not len(held):
            return None
        found = store.mask_positions(config.mask, row, int(held[rng.integers(len(held))]))
    return found[rng.integers(len(found))] if len(found) else None


def check(config: Foreground, store: StudyStore | StoreMix, role: str) -> None:
    """Raises UserError when a store does not hold what the foreground is found by."""
    field = f"inputs.images.{role}.foreground"
    if config.mask is None:
        without = store.without_intensities(role)
        if without:
            raise UserError(
                f"{field}: {without} holds no samples of the intensities of {role}, as it was written by an earlier "
                "release; build it anew, or leave `foreground` out"
            )
        return
    masks = store.schema.masks_of(role)
    if config.mask not in masks:
        raise UserError(
            f"{field}.mask: the store has no mask {config.mask} of {role}; it has {', '.join(masks) or 'none'}"
        )
