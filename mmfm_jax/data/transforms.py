"""What happens to a raw batch on the device, inside the jitted step: presence, windows, standardising, augmentation."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from mmfm_jax.config import Augment
from mmfm_jax.data.augment import augment_images, per_voxel
from mmfm_jax.data.batch import PAD, Batch, ImagePart, ImageShape, InputSpec, LabelPart, TablePart, TextPart


def prepare(batch: Batch, spec: InputSpec, augment: Augment | None, rng: PRNGKeyArray | None) -> Batch:
    """A raw batch as the model takes it: voxels in [0, 1] and numbers standardised, both float32.

    What is absent is replaced by zeros before any arithmetic, so that whatever stands there (NaN too) reaches neither
    values nor gradients. Images are augmented when both `augment` and `rng` are given; `rng` is one key for the whole
    global batch.
    """
    images = {}
    for i, role in enumerate(sorted(batch.images)):  # jit sorts dictionaries; the key of a role must not depend on that
        part = _window(batch.images[role], spec.images[role])
        if augment is not None and rng is not None:
            part = augment_images(part, augment, jax.random.fold_in(rng, i))
        images[role] = part
    return replace(
        batch,
        images=images,
        texts={field: _text(part) for field, part in batch.texts.items()},
        table=_table(batch.table, spec),
        labels={
            name: LabelPart(jnp.where(part.present, part.value, 0), part.present) for name, part in batch.labels.items()
        },
    )


def _text(part: TextPart) -> TextPart:
    return TextPart(jnp.where(part.present[:, None], part.tokens, PAD), part.present)


def _table(table: TablePart, spec: InputSpec) -> TablePart:
    """Numbers standardised, categories clipped to their vocabularies; 0 where absent."""
    mean, sd = (np.array([getattr(s, name) for s in spec.numbers.values()], np.float32) for name in ("mean", "sd"))
    last = np.array([len(vocabulary) - 1 for vocabulary in spec.categories.values()], np.int32)
    numbers = jnp.where(table.number_present, table.numbers, mean)
    categories = jnp.where(table.category_present, table.categories, 0)
    return replace(table, numbers=(numbers - mean) / sd, categories=jnp.clip(categories, 0, last))


def _window(part: ImagePart, shape: ImageShape) -> ImagePart:
    """Voxels in float32 with the window mapped to [0, 1]; zeros where absent."""
    low, high = shape.window
    voxels = jnp.where(per_voxel(part.present), jnp.asarray(part.voxels, jnp.float32), low)
    spacing_mm = jnp.where(part.present[:, None], part.spacing_mm, 0)
    return ImagePart(jnp.clip((voxels - low) / (high - low), 0, 1), spacing_mm, part.present)
