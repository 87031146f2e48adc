"""Rotary positions: over z, y, x in millimetres for images, over the index for text.

A pair of features is turned by an angle proportional to the position, so a query and a key meet by the difference of
their positions alone (RoFormer, arXiv:2104.09864). In millimetres the same anatomy at another spacing turns the same.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mmfm_jax.data.batch import Array

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
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


def waves(angles: Float[Array, "*batch pair"]) -> Float[Array, "*batch feature"]:
    """The same angles as features, sine beside cosine, for tokens that carry their position in their content."""
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
