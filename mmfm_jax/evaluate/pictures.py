"""Pictures of studies as the model is shown them, for the report."""

from __future__ import annotations

import numpy as np

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.packing import volume
from mmfm_jax.data.inspect.slices import Slice
from mmfm_jax.data.parts import PackedPart


def middle_slice(samples: Samples, row: int) -> Slice:
    """Of the first image role that the study holds."""
    study = samples.read(row, None)
    role = next(role for role, part in (study.images | study.packed).items() if part.present)
    part, shape = (study.images | study.packed)[role], samples.spec.images[role]
    voxels = volume(part, shape) if isinstance(part, PackedPart) else np.asarray(part.voxels)
    pixels = shape.displayed(voxels[voxels.shape[0] // 2], part.limits)
    held = samples.store.volume_info(role, row)
    assert held is not None
    _, y, x = held[1]
    return Slice(pixels, (y, x))
