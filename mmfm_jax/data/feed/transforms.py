"""What happens to a raw batch on the device, inside the jitted step: presence, windows, standardising, augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from mmfm_jax.config.data import Augment
from mmfm_jax.data.batch import (
    PAD,
    Array,
    Batch,
    ImagePart,
    ImageShape,
    InputSpec,
    LabelPart,
    PackedPart,
    TablePart,
    TextPart,
)
from mmfm_jax.data.feed.augment import Strength, augment_images, augment_packed, per_voxel
from mmfm_jax.data.feed.resample import resample


def prepare(
    batch: Batch, spec: InputSpec, augment: Augment | Sequence[Augment] | None, rng: PRNGKeyArray | None
) -> Batch:
    """A raw batch as the model takes it: voxels in [0, 1] and numbers standardised, both float32.

    What is absent is replaced by zeros before any arithmetic, so that whatever stands there (NaN too) reaches neither
    values nor gradients. Images are augmented when both `augment` and `rng` are given; `rng` is one key for the whole
    global batch. Windows and augmentation are those of each study's store where the batch is of several.
    """
    source = batch.source
    images = {role: _window(part, spec.images[role], source) for role, part in batch.images.items()}
    packed = {role: _window_packed(part, spec.images[role], source) for role, part in batch.packed.items()}
    if augment is not None and rng is not None:
        # jit sorts dictionaries; the key of a role must not depend on that
        keys = {role: jax.random.fold_in(rng, i) for i, role in enumerate(sorted([*images, *packed]))}
        strength = Strength.of((augment,) if isinstance(augment, Augment) else augment, source)
        images = {role: augment_images(part, strength, keys[role]) for role, part in images.items()}
        packed = {role: augment_packed(part, spec.images[role], strength, keys[role]) for role, part in packed.items()}
    return replace(
        batch,
        images=images,
        texts={field: _text(part) for field, part in batch.texts.items()},
        table=_table(batch.table, spec),
        labels={
            name: LabelPart(jnp.where(part.present, part.value, 0), part.present) for name, part in batch.labels.items()
        },
        packed=packed,
    )


def _text(part: TextPart) -> TextPart:
    present = part.present[:, None]
    return TextPart(jnp.where(present, part.tokens, PAD), part.present, jnp.where(present, part.digest, 0))


def _table(table: TablePart, spec: InputSpec) -> TablePart:
    """Numbers standardised, categories clipped to their vocabularies; 0 where absent."""
    mean, sd = (np.array([getattr(s, name) for s in spec.numbers.values()], np.float32) for name in ("mean", "sd"))
    last = np.array([len(vocabulary) - 1 for vocabulary in spec.categories.values()], np.int32)
    numbers = jnp.where(table.number_present, table.numbers, mean)
    categories = jnp.where(table.category_present, table.categories, 0)
    return replace(table, numbers=(numbers - mean) / sd, categories=jnp.clip(categories, 0, last))


def _limits(shape: ImageShape, source: Array | None) -> tuple[Any, Any]:
    """Low and high end of the window: one for all, or [batch] where stores differ."""
    if not shape.windows or source is None:
        return shape.window
    low, high = jnp.asarray(shape.windows, jnp.float32)[source].T
    return low, high


def _window(part: ImagePart, shape: ImageShape, source: Array | None) -> ImagePart:
    """Voxels in float32 with the window mapped to [0, 1]; zeros where absent."""
    low, high = (x if isinstance(x, float) else per_voxel(x) for x in _limits(shape, source))
    voxels = jnp.where(per_voxel(part.present), jnp.asarray(part.voxels, jnp.float32), low)
    spacing_mm = jnp.where(part.present[:, None], part.spacing_mm, 0)
    windowed = (voxels - low) / (high - low)
    if shape.spacing_mm is not None:  # before values are clipped, as resampling the raw ones would be
        # A slice has no other spacing, and nothing divides by that of what is absent.
        target = jnp.where(np.array(shape.size) > 1, jnp.asarray(shape.spacing_mm), part.spacing_mm)
        windowed = resample(windowed, jnp.where(spacing_mm > 0, spacing_mm, 1.0), shape.spacing_mm, shape.size)
        spacing_mm = jnp.where(part.present[:, None], target, 0)
    return ImagePart(jnp.clip(windowed, 0, 1), spacing_mm, part.present)


def _window_packed(part: PackedPart, shape: ImageShape, source: Array | None) -> PackedPart:
    """Likewise, patches; zeros and segment 0 where a token is padding or its study absent.

    A voxel that is NaN counts as the low end of the window: tokens of one row share products of matrices, where NaN
    times a weight of zero is NaN, so one study's would reach its neighbours.
    """
    low, high = (x if isinstance(x, float) else part.by_token(x)[..., None] for x in _limits(shape, source))
    valid = part.valid
    voxels = jnp.asarray(part.patches, jnp.float32)
    voxels = jnp.where(valid[..., None] & ~jnp.isnan(voxels), voxels, low)
    centres_mm = jnp.where(valid[..., None], part.centres_mm, 0)
    segment = None if part.segment is None else jnp.where(valid, part.segment, 0)
    return PackedPart(jnp.clip((voxels - low) / (high - low), 0, 1), centres_mm, segment, part.present)
