"""Rotary positions: over z, y, x in millimetres for images, over the index for text.

A pair of features is turned by an angle proportional to the position, so a query and a key meet by the difference of
their positions alone (RoFormer, arXiv:2104.09864). In millimetres the same anatomy at another spacing turns the same.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mmfm_jax.data.batch import Array
from mmfm_jax.parallel.platform import platform

TEXT_WAVELENGTHS = (2 * np.pi, 2 * np.pi * 10_000)  # tokens; those of RoFormer


def wavelengths(pairs: int, shortest: float, longest: float) -> np.ndarray:
    """`pairs` wavelengths in geometric progression, both ends included."""
    return np.geomspace(shortest, longest, pairs) if pairs > 1 else np.full(pairs, shortest)


def angles_1d(length: int, head_width: int) -> Float[np.ndarray, "length pair"]:
    """Angles of tokens in a row."""
    return 2 * np.pi * np.arange(length)[:, None] / wavelengths(head_width // 2, *TEXT_WAVELENGTHS)


def angles_3d(
    coordinates_mm: Float[Array, "*batch tokens 3"], head_width: int, range_mm: tuple[float, float]
) -> Float[Array, "*batch tokens pair"]:
    """Angles of positions in space: a third of the pairs turns with each of z, y, x; pairs left over stay still."""
    each = head_width // 6
    turns = coordinates_mm[..., None] / wavelengths(each, *range_mm).astype(np.float32)
    angles = 2 * np.pi * turns.reshape(*turns.shape[:-2], 3 * each)
    still = [(0, 0)] * (angles.ndim - 1) + [(0, head_width // 2 - 3 * each)]
    return jnp.pad(angles, still)


def rotate(
    x: Float[Array, "batch tokens heads head"], angles: Float[Array, "#batch tokens pair"]
) -> Float[Array, "batch tokens heads head"]:
    """Turns feature i with feature i + head / 2 by angle i, in float32."""
    cosine, sine = (jnp.concatenate([f(angles), f(angles)], axis=-1)[..., None, :] for f in (jnp.cos, jnp.sin))
    return (x.astype(jnp.float32) * cosine + _partners(x).astype(jnp.float32) * sine).astype(x.dtype)


def _partners(x: Float[Array, "*batch head"]) -> Float[Array, "*batch head"]:
    """What each feature is turned with: minus the second half of them, then the first."""
    head = x.shape[-1]
    if platform() != "tpu":
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([-second, first], axis=-1)
    # Cutting the 128 lanes of a vector in two moves every number twice through memory; the matrix unit is all but free,
    # and a product with one 1 or -1 a column is exact.
    permutation = np.roll(np.diag(np.repeat([1, -1], head // 2)), head // 2, axis=1)
    return jnp.matmul(x, jnp.asarray(permutation, x.dtype), precision="highest")


def waves(angles: Float[Array, "*batch pair"]) -> Float[Array, "*batch feature"]:
    """The same angles as features, sine beside cosine, for tokens that carry their position in their content."""
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
