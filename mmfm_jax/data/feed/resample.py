"""Crops of native spacing brought to the spacing of the model, on the device.

The host reads of each image what the target field of view and the kernel cover, and places it in the middle of an array
of one size for all (`ImageShape.read`); the device then takes weighted means along one axis after another, which are
products of small matrices. The kernel is that of ingest: linear, and as wide as the target where that is coarser, so
that what is finer is averaged and does not alias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float

from mmfm_jax.data.parts import Array


def extent(size: Sequence[int], target_mm: Sequence[float], spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Voxels z y x to read of an image of `spacing_mm`, so that `size` voxels of `target_mm` can be made of them.

    Odd where `size` is odd, so both have one centre and an image of the target spacing is not blurred. An axis of one
    voxel is left alone.
    """

    def along(s: int, target: float, native: float) -> int:
        if s == 1:
            return 1
        step = target / native
        n = math.ceil((s - 1) * step + 2 * max(1.0, step) - 1e-6)
        return n + (n - s) % 2

    z, y, x = (along(*of) for of in zip(size, target_mm, spacing_mm))
    return z, y, x


def resample(
    voxels: Float[Array, "batch z y x channel"],
    spacing_mm: Float[Array, "batch 3"],
    target_mm: Sequence[float],
    size: Sequence[int],
) -> Float[Array, "batch z y x channel"]:
    """`size` voxels of spacing `target_mm` about the centre of each image; 0 where an image does not reach."""
    import jax.numpy as jnp  # `extent` is asked by processes that read studies, which have no JAX

    for axis, (target, m) in enumerate(zip(target_mm, size)):
        n = voxels.shape[axis + 1]
        if m == n == 1:
            continue
        step = (target / spacing_mm[:, axis])[:, None]
        at = (jnp.arange(m) - (m - 1) / 2) * step + (n - 1) / 2
        width = jnp.maximum(1.0, step)[:, :, None]
        weights = jnp.maximum(0.0, 1 - jnp.abs(jnp.arange(n) - at[:, :, None]) / width)
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)
        moved = jnp.einsum("bmn,bn...->bm...", weights, jnp.moveaxis(voxels, axis + 1, 1), precision="highest")
        voxels = jnp.moveaxis(moved, 1, axis + 1)
    return voxels
