"""The decoder of masked modelling: queries that name a hidden place read what the fused latents know of it."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Float

from mmfm_jax.config import TransformerConfig
from mmfm_jax.data.batch import Array
from mmfm_jax.model.transformer import Transformer


class Decoder(nnx.Module):
    """Queries attend to the latents and not to one another, so each is predicted on its own."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.transformer = Transformer(config, rngs, self_attention=False, cross_attention=True)

    def __call__(
        self, queries: Float[Array, "batch query width"], latents: Float[Array, "batch latent width"]
    ) -> Float[Array, "batch query width"]:
        return self.transformer(queries, memory=latents)
