"""What is kept of a mask beside its voxels: how many each class has, and a bounded sample of where they are.

Crops balanced by class (nnU-Net, doi:10.1038/s41592-020-01008-z) need places of a class without reading the mask. They
are drawn once, when the store is written, so a training step reads some kilobytes whatever the size of the volume.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

POSITIONS = 1000
"""Most positions that are kept of each class of a mask."""


@dataclass(frozen=True)
class MaskSummary:
    """Of one mask."""

    voxels: np.ndarray
    """Of each class, background left out, int64 [class]."""
    positions: np.ndarray
    """z y x of voxels of each class, int32 [class, POSITIONS, 3], at random among all of the class and in raster order;
    the first min(POSITIONS, voxels) of a class count and the rest are zeros."""


def summarise(mask: np.ndarray, classes: int) -> MaskSummary:
    """Counts and samples the classes of a mask, uint8 [z, y, x] of values up to `classes`.

    The draw is seeded with a hash of the voxels, so it does not depend on where in a store the mask stands. It is
    uniform and without replacement. Memory beyond the mask: one slice and the sample.
    """
    counts = np.stack([np.bincount(plane.ravel(), minlength=classes + 1) for plane in mask])  # [z, value]
    voxels = counts[:, 1:].sum(0)
    rng = np.random.default_rng(list(hashlib.sha256(np.ascontiguousarray(mask).data).digest()))
    # Which voxels of each class, counted in raster order: as (slice, how many of the class stand before it there).
    drawn: list[np.ndarray] = []
    for value in np.flatnonzero(voxels) + 1:
        ranks = np.sort(rng.choice(voxels[value - 1], min(POSITIONS, voxels[value - 1]), replace=False))
        upto = np.cumsum(counts[:, value])
        z = np.searchsorted(upto, ranks, side="right")
        before = ranks - (upto - counts[:, value])[z]
        drawn.append(np.stack([np.full(len(ranks), value), np.arange(len(ranks)), z, before], -1))
    positions = np.zeros((classes, POSITIONS, 3), np.int32)
    value, slot, z, before = np.concatenate(drawn).T if drawn else np.zeros((4, 0), np.int64)
    for plane in np.unique(z):
        here = z == plane
        by_value = np.argsort(mask[plane], axis=None, kind="stable")  # raster order within each value
        first = np.cumsum(counts[plane]) - counts[plane]
        flat = by_value[first[value[here]] + before[here]]
        at = value[here] - 1, slot[here]
        positions[(*at, 0)] = plane
        positions[(*at, slice(1, 3))] = np.stack(np.unravel_index(flat, mask.shape[1:]), -1)
    return MaskSummary(voxels, positions)
