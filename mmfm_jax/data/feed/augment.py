"""Random changes to the images of a batch, on the device: mirror, shift, turn, contrast and brightness.

All random numbers of a global batch come from one key and are drawn for all of it, and each volume is made from its
own voxels alone; so the result does not depend on how the batch is sharded, and nothing crosses devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from mmfm_jax.config.data import Augment
from mmfm_jax.data.batch import Array, ImagePart, ImageShape, PackedPart


@dataclass(frozen=True)
class Strength:
    """How strongly the studies of a batch are augmented: a number for all, or [batch, 1] where their stores differ."""

    flip: Any
    """Likewise, or the chances along z y x: a tuple for all, or [batch, 3]."""
    shift_mm: Any
    rotate_degrees: Any
    intensity: Any

    @classmethod
    def of(cls, configs: Sequence[Augment], source: Array | None = None) -> Strength:
        """`source`: which of `configs` is that of each study; without it the first is of all."""

        def each(name: str) -> Any:
            values = [getattr(config, name) for config in configs]
            if source is None or len(set(values)) == 1:
                return values[0]
            each_axis = [np.broadcast_to(value, 3 if name == "flip" else 1) for value in values]
            return jnp.asarray(np.stack(each_axis), jnp.float32)[source]

        return cls(each("flip"), each("shift_mm"), each("rotate_degrees"), each("intensity"))


def _some(strength: Any) -> bool:
    """Whether anything is to be done, as far as is known when the step is traced."""
    return isinstance(strength, jax.Array) or bool(np.any(strength))


def _mirrored(flip: Any, studies: int, rng: PRNGKeyArray) -> Bool[jax.Array, "batch 3"]:
    """Along which of z y x each study is mirrored; never along one whose chance is 0."""
    return jax.random.bernoulli(rng, jnp.asarray(flip, jnp.float32), (studies, 3))


def augment_images(part: ImagePart, config: Augment | Strength, rng: PRNGKeyArray) -> ImagePart:
    """Each present volume mirrored, moved, turned and given another contrast and brightness, all at random."""
    flip_rng, shift_rng, angle_rng, contrast_rng, brightness_rng = jax.random.split(rng, 5)
    voxels, studies = part.voxels, len(part.present)
    mirror = _mirrored(config.flip, studies, flip_rng)
    if _some(config.shift_mm) or _some(config.rotate_degrees):
        shift_mm = jax.random.uniform(shift_rng, (studies, 3), minval=-1) * config.shift_mm
        angles = jax.random.uniform(angle_rng, (studies, 3), minval=-1) * (config.rotate_degrees * (np.pi / 180))
        # Nothing divides by the zero spacing of absent volumes.
        voxels = move(voxels, jnp.where(part.present[:, None], part.spacing_mm, 1), shift_mm, angles, mirror)
    elif _some(config.flip):
        voxels = flip(voxels, mirror)
    if _some(config.intensity):
        intensity = jnp.reshape(config.intensity, -1)
        contrast = 1 + jax.random.uniform(contrast_rng, (studies,), minval=-1) * intensity
        brightness = jax.random.uniform(brightness_rng, (studies,), minval=-1) * intensity
        voxels = (voxels - 0.5) * per_voxel(contrast) + 0.5 + per_voxel(brightness)
    return replace(part, voxels=jnp.where(per_voxel(part.present), jnp.clip(voxels, 0, 1), 0))


def augment_packed(part: PackedPart, shape: ImageShape, config: Augment | Strength, rng: PRNGKeyArray) -> PackedPart:
    """Likewise for patches, with the same draws for each study: mirrored, and given another contrast and brightness.

    A mirror image of a crop is that of each patch, at the mirrored place. Nothing that resamples is done.
    """
    flip_rng, _, _, contrast_rng, brightness_rng = jax.random.split(rng, 5)
    patches, centres_mm, studies = part.patches, part.centres_mm, len(part.present)
    if _some(config.flip):
        mirror = part.by_token(_mirrored(config.flip, studies, flip_rng))
        cut = jnp.asarray(patches).reshape(-1, *shape.patch, shape.channels)
        patches = flip(cut, mirror.reshape(-1, 3)).reshape(patches.shape)
        centres_mm = jnp.where(mirror, -centres_mm, centres_mm)
    if _some(config.intensity):
        intensity = jnp.reshape(config.intensity, -1)
        contrast = 1 + jax.random.uniform(contrast_rng, (studies,), minval=-1) * intensity
        brightness = jax.random.uniform(brightness_rng, (studies,), minval=-1) * intensity
        contrast, brightness = (part.by_token(x)[..., None] for x in (contrast, brightness))
        patches = (patches - 0.5) * contrast + 0.5 + brightness
    return replace(part, patches=jnp.where(part.valid[..., None], jnp.clip(patches, 0, 1), 0), centres_mm=centres_mm)


def flip(
    voxels: Float[Array, "batch z y x channel"], axes: Bool[Array, "batch 3"]
) -> Float[Array, "batch z y x channel"]:
    """Mirror images along those of z y x that are marked."""
    for axis in range(3):
        if voxels.shape[axis + 1] > 1:
            voxels = jnp.where(per_voxel(axes[:, axis]), jnp.flip(voxels, axis + 1), voxels)
    return voxels


def move(
    voxels: Float[Array, "batch z y x channel"],
    spacing_mm: Float[Array, "batch 3"],
    shift_mm: Float[Array, "batch 3"],
    angles: Float[Array, "batch 3"],
    mirror: Bool[Array, "batch 3"],
) -> Float[Array, "batch z y x channel"]:
    """Volumes mirrored, turned about their centres by `angles` (radians about z, y, x, in that order), then shifted.

    Turning happens in physical space, so anisotropic voxels do not shear. One linear interpolation for all of it;
    zero beyond the volume. An image of one slice stays in its plane: along an axis of one voxel nothing is shifted,
    and nothing is turned about the other two.
    """
    wide = np.array(voxels.shape[1:4]) > 1
    can_turn = np.array([wide[[1, 2]].all(), wide[[0, 2]].all(), wide[[0, 1]].all()])
    rotation = _rotation(jnp.where(can_turn, angles, 0))
    # Where output voxel p comes from, both counted from the centre: M S^-1 R^T (S p - shift), with S = diag(spacing)
    # and M = diag(+-1). To mirror here costs nothing; XLA would fuse a `flip` into each of the eight reads of a voxel.
    back = jnp.swapaxes(rotation, 1, 2) * jnp.where(mirror, -1, 1)[:, :, None] / spacing_mm[:, :, None]
    matrix = back * spacing_mm[:, None, :]
    offset = -jnp.einsum("bij,bj->bi", back, jnp.where(wide, shift_mm, 0), precision="highest")
    return jax.vmap(_interpolate)(voxels, matrix, offset)


def _rotation(angles: Float[Array, "batch 3"]) -> Float[Array, "batch 3 3"]:
    """Matrices on (z, y, x) vectors: first about z, then y, then x."""
    total = jnp.eye(3)
    for axis, (i, j) in enumerate([(1, 2), (0, 2), (0, 1)]):
        c, s = jnp.cos(angles[:, axis]), jnp.sin(angles[:, axis])
        turn = jnp.zeros((len(angles), 3, 3)).at[:, axis, axis].set(1)
        turn = turn.at[:, i, i].set(c).at[:, j, j].set(c).at[:, i, j].set(-s).at[:, j, i].set(s)
        total = jnp.matmul(turn, total, precision="highest")
    return total


def _interpolate(
    volume: Float[Array, "z y x channel"], matrix: Float[Array, "3 3"], offset: Float[Array, 3]
) -> Float[Array, "z y x channel"]:
    """Output voxel p, counted from the centre, takes the linearly interpolated value at `matrix @ p + offset`."""
    shape = volume.shape[:3]
    middle = [(s - 1) / 2 for s in shape]
    grid = [jnp.arange(s) - m for s, m in zip(shape, middle)]
    z, y, x = grid[0][:, None, None], grid[1][:, None], grid[2]
    at = [matrix[a, 0] * z + matrix[a, 1] * y + matrix[a, 2] * x + offset[a] + middle[a] for a in range(3)]
    below = [jnp.floor(p) for p in at]
    rows = volume.reshape(-1, volume.shape[3])
    out = jnp.zeros_like(volume)
    for corner in itertools.product(*((0, 1) if s > 1 else (0,) for s in shape)):
        weight, index = jnp.ones(shape), jnp.zeros(shape, jnp.int32)
        for p, low, step, size in zip(at, below, corner, shape):
            near = low + step
            share = 1 - jnp.abs(p - near) if size > 1 else 1.0
            weight = weight * jnp.where((near >= 0) & (near < size), share, 0)
            index = index * size + jnp.clip(near, 0, size - 1).astype(jnp.int32)
        out += weight[..., None] * rows[index]
    return out


def per_voxel(values: Array) -> Array:
    """[batch] against [batch z y x channel]."""
    return values[:, None, None, None, None]
