"""What happens to a raw batch on the device, inside the jitted step: presence, windows, standardising, augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from mmfm_jax.config.data import Augment
from mmfm_jax.config.inputs import as_channels
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
from mmfm_jax.parallel.sharding import constrain


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
        images=in_slabs(images, spec),
        texts={field: _text(part) for field, part in batch.texts.items()},
        table=_table(batch.table, spec),
        labels={
            name: LabelPart(jnp.where(part.present, part.value, 0), part.present) for name, part in batch.labels.items()
        },
        packed=packed,
    )


def in_slabs(images: dict[str, ImagePart], spec: InputSpec) -> dict[str, ImagePart]:
    """Volumes split over the mesh as their tokens will be, where it divides these: in slabs of whole patches along the
    first axis that has more than one. What is done to each voxel by itself before is then done to a slab a device.

    A batch comes split by study alone, so every device of a ring holds the raw volume whole; nothing else need be.
    """
    return {role: replace(part, voxels=_slab(part.voxels, spec.images[role])) for role, part in images.items()}


def _slab(voxels: Array, shape: ImageShape) -> Array:
    axis = 1 + next((i for i, patches in enumerate(shape.grid) if patches > 1), 0)
    sizes, axes = list(voxels.shape), ["batch", *[None] * 4]
    sizes[axis : axis + 1] = shape.grid[axis - 1], shape.patch[axis - 1]
    axes[axis : axis + 1] = "tokens", None
    return constrain(voxels.reshape(sizes), *axes).reshape(voxels.shape)


def _text(part: TextPart) -> TextPart:
    present = part.present[:, None]
    excerpt = None if part.excerpt is None else jnp.where(present, part.excerpt, PAD)
    return TextPart(jnp.where(present, part.tokens, PAD), part.present, jnp.where(present, part.digest, 0), excerpt)


def _table(table: TablePart, spec: InputSpec) -> TablePart:
    """Numbers standardised, categories clipped to their vocabularies; 0 where absent."""
    mean, sd = (np.array([getattr(s, name) for s in spec.numbers.values()], np.float32) for name in ("mean", "sd"))
    last = np.array([len(vocabulary) - 1 for vocabulary in spec.categories.values()], np.int32)
    numbers = jnp.where(table.number_present, table.numbers, mean)
    categories = jnp.where(table.category_present, table.categories, 0)
    return replace(table, numbers=(numbers - mean) / sd, categories=jnp.clip(categories, 0, last))


def _limits(part: ImagePart | PackedPart, shape: ImageShape, source: Array | None) -> Float[Array, "study window 2"]:
    """Ends of the windows of each study; of one study where all have the same."""
    if shape.window is None:
        # Nothing divides by what stands there for an absent volume.
        limits = jnp.where(part.present[:, None], jnp.asarray(part.limits), jnp.asarray([0.0, 1.0]))
        return limits[:, None]
    if shape.windows and source is not None:
        return jnp.asarray([as_channels(windows) for windows in shape.windows], jnp.float32)[source]
    return np.asarray([as_channels(shape.window)], np.float32)


def _windows(voxels: Array, limits: Array) -> tuple[jax.Array, Array, Array]:
    """Voxels [..., channel] in float32, each once for every window [..., channel * window], and the windows' low and
    high ends, which broadcast against them."""
    voxels, windows = jnp.asarray(voxels, jnp.float32), limits.shape[-2]
    if windows > 1:
        limits = jnp.tile(limits, (voxels.shape[-1], 1))
        voxels = jnp.repeat(voxels, windows, axis=-1)
    return voxels, limits[..., 0], limits[..., 1]


def _window(part: ImagePart, shape: ImageShape, source: Array | None) -> ImagePart:
    """Voxels in float32 with the windows mapped to [0, 1]; zeros where absent."""
    voxels, low, high = _windows(part.voxels, _limits(part, shape, source)[:, None, None, None])
    voxels = jnp.where(per_voxel(part.present), voxels, low)
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
    limits = _limits(part, shape, source)
    voxels, low, high = _windows(part.patches, limits[:, None] if len(limits) == 1 else part.by_token(limits))
    valid = part.valid
    voxels = jnp.where(valid[..., None] & ~jnp.isnan(voxels), voxels, low)
    centres_mm = jnp.where(valid[..., None], part.centres_mm, 0)
    segment = None if part.segment is None else jnp.where(valid, part.segment, 0)
    return PackedPart(jnp.clip((voxels - low) / (high - low), 0, 1), centres_mm, segment, part.present)
