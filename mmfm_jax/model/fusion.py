"""The fusion: learned latents that cross-attend to every token present (Perceiver, arXiv:2103.03206)."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from mmfm_jax.config import FusionConfig
from mmfm_jax.data.batch import Array
from mmfm_jax.model.layers import Linear, Table
from mmfm_jax.model.transformer import Transformer


class Fusion(nnx.Module):
    """Projects the tokens of each part to the fusion width, marks their part, and reads them with the latents."""

    def __init__(self, config: FusionConfig, widths: dict[str, int], dtype: jnp.dtype, rngs: nnx.Rngs):
        """`widths`: of the tokens of each part, by the part's name."""
        self.parts, self.dtype = tuple(widths), dtype
        self.project = nnx.List([Linear(width, config.width, ("mlp", "width"), rngs) for width in widths.values()])
        self.part = Table(len(widths), config.width, rngs)
        self.latents = Table(config.latents, config.width, rngs)
        self.transformer = Transformer(config, rngs, cross_attention=True)

    def __call__(
        self,
        tokens: Mapping[str, Float[Array, "batch token part_width"]],
        present: Mapping[str, Bool[Array, "batch token"]],
    ) -> Float[Array, "batch latent width"]:
        projected = [
            project(tokens[name]) + self.part.all[i].astype(self.dtype)
            for i, (name, project) in enumerate(zip(self.parts, self.project))
        ]
        memory = jnp.concatenate(projected, axis=1)
        memory_present = jnp.concatenate([present[name] for name in self.parts], axis=1)
        latents = jnp.broadcast_to(self.latents.all, (len(memory), *self.latents.all.shape)).astype(self.dtype)
        return self.transformer(latents, memory=memory, memory_present=memory_present)
