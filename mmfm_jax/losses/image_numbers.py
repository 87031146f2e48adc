"""Numbers of an image that need no label, computed on the device: targets of a regression."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mmfm_jax.data.batch import Array

SCALES = {
    "log_volume": 1.5,
    "log_sum": 1.5,
    "log_surface": 1.0,
    "log_variation": 1.0,
    "log_occupied_z": 0.5,
    "log_occupied_y": 0.5,
    "log_occupied_x": 0.5,
    "log_sphericity": 0.1,
    "partial": 0.1,
    "log_long": 0.5,
    "log_middle": 0.5,
    "log_short": 0.5,
    "log_middle_to_long": 0.2,
    "log_short_to_long": 0.25,
    "log_largest_compactness": 0.3,
    "log_mean_compactness": 0.2,
    "mean": 0.1,
    "sd": 0.1,
}
"""What each number is divided by: about its standard deviation over the outlines of lung nodules."""
NAMES = tuple(SCALES)


def image_numbers(
    voxels: Float[Array, "batch z y x channel"], spacing_mm: Float[Array, "batch 3"]
) -> Float[Array, "batch channel number"]:
    """NAMES of each channel, `voxels` from 0 to 1; what is bright is inside, from a half on. Each over its scale.

    - volume, sum: of the voxels inside, and of all values, plus one voxel, as shares of the crop; surface, variation:
      faces between inside and outside, and the absolute differences of neighbours over faces, plus those of one voxel,
      over the surface of the crop; occupied: planes that hold something inside, plus one, of the planes of the crop;
    - sphericity: surface of the ball of the same volume to the surface (Wadell 1935); partial: of the voxels above 0,
      the share below 1; long, middle, short: standard deviations of the values along their principal axes, over the
      mean extent of the crop, and their ratios;
    - compactness: perimeter squared over area of the slices z that hold something inside, of a square 1;
    - mean and standard deviation of the values above 0.

    Beyond the crop is 0. Logarithms are natural. Mirroring the image changes nothing.
    """
    v = jnp.moveaxis(jnp.asarray(voxels, jnp.float32), -1, 1)
    size = np.array(v.shape[2:], np.float32)
    spacing = jnp.asarray(spacing_mm, jnp.float32)[:, None]  # for every channel
    spacing = jnp.where(spacing > 0, spacing, 1)  # of absent images, so that no gradient is NaN
    inside = v >= 0.5
    face = spacing.prod(axis=-1, keepdims=True) / spacing  # mm2 of a voxel's face along each axis
    of_slice = [_steps(inside.astype(jnp.float32), axis) for axis in range(3)]
    faces = jnp.stack([of.sum(axis=-1) for of in of_slice], axis=-1)
    differences = jnp.stack([_steps(v, axis).sum(axis=-1) for axis in range(3)], axis=-1)
    crop_surface, voxel_surface = 2 * (face * size.prod() / size).sum(axis=-1), 2 * face.sum(axis=-1)
    volume, total, voxels_of_crop = _sum(inside), _sum(v), float(size.prod())
    surface = (faces * face).sum(axis=-1) + voxel_surface
    variation = (differences * face).sum(axis=-1) + voxel_surface
    occupied = [jnp.any(inside, axis=tuple(2 + a for a in range(3) if a != axis)).sum(axis=-1) for axis in range(3)]
    voxel = spacing.prod(axis=-1)
    sphericity = np.pi ** (1 / 3) * (6 * (volume + 1) * voxel) ** (2 / 3) / surface
    above = _sum(v > 0)
    some = jnp.maximum(above, 1)
    deviations = jnp.sqrt(_principal_variances(v, total, spacing)) / (size * spacing).mean(axis=-1, keepdims=True)
    short, middle, long = jnp.log(deviations[..., 0]), jnp.log(deviations[..., 1]), jnp.log(deviations[..., 2])
    area = inside.sum(axis=(3, 4)) * face[..., :1]
    perimeter = (of_slice[1] * face[..., 1:2] + of_slice[2] * face[..., 2:]) / spacing[..., :1]
    held = area > 0
    compactness = jnp.where(held, perimeter**2 / jnp.where(held, area, 1) / 16, 0)
    mean = total / some
    numbers = {
        "log_volume": jnp.log((volume + 1) / voxels_of_crop),
        "log_sum": jnp.log((total + 1) / voxels_of_crop),
        "log_surface": jnp.log(surface / crop_surface),
        "log_variation": jnp.log(variation / crop_surface),
        **{f"log_occupied_{name}": jnp.log((n + 1) / (of + 1)) for name, n, of in zip("zyx", occupied, size)},
        "log_sphericity": jnp.log(sphericity),
        "partial": _sum((v > 0) & (v < 1)) / some,
        "log_long": long,
        "log_middle": middle,
        "log_short": short,
        "log_middle_to_long": middle - long,
        "log_short_to_long": short - long,
        "log_largest_compactness": jnp.log(compactness.max(axis=-1) + 1),
        "log_mean_compactness": jnp.log(compactness.sum(axis=-1) / jnp.maximum(held.sum(axis=-1), 1) + 1),
        "mean": mean,
        "sd": jnp.sqrt(jnp.maximum(_sum(jnp.square(v)) / some - jnp.square(mean), 0)),
    }
    return jnp.stack([numbers[name] / scale for name, scale in SCALES.items()], axis=-1)


def _sum(x: Array) -> Float[jax.Array, "batch channel"]:
    return x.sum(axis=(2, 3, 4), dtype=jnp.float32)


def _steps(x: Float[Array, "batch channel z y x"], axis: int) -> Float[jax.Array, "batch channel z"]:
    """Sums of the absolute differences of neighbours along an axis, by slice z (along z: all in the first); what lies
    beyond the ends is 0."""
    axis += 2
    first, last = (jax.lax.index_in_dim(x, at, axis, keepdims=True) for at in (0, x.shape[axis] - 1))
    inner = jnp.abs(jax.lax.slice_in_dim(x, 1, None, axis=axis) - jax.lax.slice_in_dim(x, 0, -1, axis=axis))
    if axis == 2:
        return (inner.sum(axis=(2, 3, 4)) + jnp.abs(first).sum(axis=(2, 3, 4)) + jnp.abs(last).sum(axis=(2, 3, 4)))[
            ..., None
        ]
    return inner.sum(axis=(3, 4)) + (jnp.abs(first) + jnp.abs(last)).sum(axis=(3, 4))


def _principal_variances(
    v: Float[Array, "batch channel z y x"], total: Float[Array, "batch channel"], spacing: Float[Array, "batch 1 3"]
) -> Float[jax.Array, "batch channel 3"]:
    """Of the places of voxels, weighted by their values, that of a voxel itself included; mm2, the smallest first."""
    weight = 1 / jnp.maximum(total, 1e-6)[..., None, None]
    places = [jnp.arange(n, dtype=jnp.float32) - (n - 1) / 2 for n in v.shape[2:]]
    onto = {(i, j): v.sum(axis=2 + k) * weight for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0))}  # planes
    line = [onto[0, 1].sum(axis=3), onto[0, 1].sum(axis=2), onto[0, 2].sum(axis=2)]
    mean = [(of * place).sum(axis=-1) for of, place in zip(line, places)]
    own = [place - m[..., None] for place, m in zip(places, mean)]
    squares = [(of * jnp.square(x)).sum(axis=-1) + 1 / 12 for of, x in zip(line, own)]
    crossed = {ij: jnp.einsum("bcij,bci,bcj->bc", of, own[ij[0]], own[ij[1]]) for ij, of in onto.items()}
    step = [spacing[..., axis] for axis in range(3)]
    diagonal = [square * jnp.square(s) for square, s in zip(squares, step)]
    beside = {(i, j): of * step[i] * step[j] for (i, j), of in crossed.items()}
    least = jnp.square(spacing.min(axis=-1))[..., None] / 24  # rounding
    return jnp.maximum(_eigenvalues(diagonal, beside), least)


def _eigenvalues(diagonal: list[jax.Array], beside: dict[tuple[int, int], jax.Array]) -> Float[jax.Array, "... 3"]:
    """Of symmetric matrices of three rows, the smallest first (Smith, Commun. ACM 4, 1961)."""
    (a, b, c), (d, e, f) = diagonal, (beside[0, 1], beside[0, 2], beside[1, 2])
    middle = (a + b + c) / 3
    a, b, c = a - middle, b - middle, c - middle
    spread = jnp.sqrt((a * a + b * b + c * c + 2 * (d * d + e * e + f * f)) / 6)
    determinant = a * (b * c - f * f) - d * (d * c - f * e) + e * (d * f - b * e)
    cosine = determinant / (2 * jnp.maximum(spread, 1e-12) ** 3)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1)) / 3
    largest, smallest = (middle + 2 * spread * jnp.cos(angle + turn) for turn in (0, 2 * np.pi / 3))
    return jnp.stack([smallest, 3 * middle - largest - smallest, largest], axis=-1)
