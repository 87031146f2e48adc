"""The text encoder: bidirectional, one for all fields."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.data.batch import Array
from mmfm_jax.model.flash import Segments
from mmfm_jax.model.layers import Table
from mmfm_jax.model.position import angles_1d
from mmfm_jax.model.transformer import Transformer


class TextEncoder(nnx.Module):
    def __init__(self, config: TransformerConfig, vocabulary_size: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.embed = Table(vocabulary_size, config.width, rngs, kind="embedding", axis="vocabulary")
        self.transformer = Transformer(config, rngs)

    def __call__(
        self, tokens: Int[Array, "batch length"], present: Bool[Array, "batch length"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "batch length width"]:
        """`keys`: one a study, of noise in training."""
        angles = angles_1d(tokens.shape[1], self.config.width // self.config.heads)[None]
        x = self.embed(tokens).astype(self.dtype)
        return self.transformer(x, Segments.present(present), jnp.asarray(angles, jnp.float32), keys=keys)
