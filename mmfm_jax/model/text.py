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
from mmfm_jax.model.regularise import fold
from mmfm_jax.model.transformer import Transformer


class TextEncoder(nnx.Module):
    def __init__(self, config: TransformerConfig, vocabulary_size: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.embed = Table(vocabulary_size, config.width, rngs, kind="embedding", axis="vocabulary")
        self.transformer = Transformer(config, rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch token"],
        present: Bool[Array, "batch token"],
        length: int,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch token width"]:
        """`length`: tokens of a text. Of several of a study side by side, each is encoded as if it stood alone. `keys`:
        one a study, of noise in training."""
        readings = tokens.shape[1] // length
        if keys is not None and readings > 1:
            keys = jnp.stack([fold(keys, i) for i in range(readings)], axis=1).reshape(-1)
        angles = angles_1d(length, self.config.width // self.config.heads)[None]
        x = self.embed(tokens.reshape(-1, length)).astype(self.dtype)
        segments = Segments.present(present.reshape(-1, length))
        x = self.transformer(x, segments, jnp.asarray(angles, jnp.float32), keys=keys)
        return x.reshape(*tokens.shape, -1)
