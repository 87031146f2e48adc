"""Where a share of training crops is centred, as nnU-Net does: on the foreground or on a class of a mask.

nnU-Net (doi:10.1038/s41592-020-01008-z) centres a third of its patches on a voxel of a class that the case holds. No
volume is read for that here: places of each class of a mask (`store/masks.py`) and intensities at even places of each
image (`store/foreground.py`) were sampled when the store was written, a few kilobytes a volume, whatever its size.
"""

from __future__ import annotations

import numpy as np

from mmfm_jax.config.inputs import Foreground
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.errors import UserError


def centre(config: Foreground, store: Studies, role: str, row: int, rng: np.random.Generator) -> np.ndarray | None:
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


def check(config: Foreground, store: Studies, role: str) -> None:
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
