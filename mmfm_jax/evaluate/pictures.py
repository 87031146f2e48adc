"""Pictures of studies as the model is shown them, for the report."""

from __future__ import annotations

import numpy as np

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.packing import volume
from mmfm_jax.data.inspect.slices import Slice


def middle_slice(samples: Samples, row: int) -> Slice:
    """Of the first image role that the study holds."""
    study = samples.read(row, None)
    role = next(role for role, part in (study.images | study.packed).items() if part.present)
    shape = samples.spec.images[role]
    low, high = shape.window
    voxels = volume(study.packed[role], shape) if role in study.packed else np.asarray(study.images[role].voxels)
    pixels = np.clip((voxels[voxels.shape[0] // 2].astype(np.float32) - low) / (high - low), 0, 1)
    held = samples.store.volume_info(role, row)
    assert held is not None
    _, y, x = held[1]
    return Slice(pixels, (y, x))
