"""Means over what is present."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float

from mmfm_jax.data.batch import Array


def mean_where(value: Float[Array, "*shape"], present: Array) -> Float[Array, ""]:
    """Mean over what is present; 0 when nothing is. What is absent has no part in value or gradient, even if NaN."""
    total = jnp.where(present, value, 0).sum()
    return total / jnp.maximum(jnp.broadcast_to(present, value.shape).sum(), 1)
