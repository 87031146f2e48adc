"""The fusion: learned latents that cross-attend to every token present (Perceiver, arXiv:2103.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from mmfm_jax.config.model import FusionConfig
from mmfm_jax.data.batch import Array
from mmfm_jax.model.layers import Linear, Table
from mmfm_jax.model.tokens import Tokens, join
from mmfm_jax.model.transformer import Transformer


class Fusion(nnx.Module):
    """Projects the tokens of each part to the fusion width, marks their part, and reads them with the latents."""

    def __init__(self, config: FusionConfig, widths: dict[str, int], dtype: jnp.dtype, rngs: nnx.Rngs):
        """`widths`: of the tokens of each part, by the part's name."""
        self.parts, self.dtype = tuple(widths), dtype
        self.project = nnx.List([Linear(width, config.width, ("mlp", "width"), rngs) for width in widths.values()])
        self.part = Table(len(widths), config.width, rngs, kind="position")
        self.latents = Table(config.latents, config.width, rngs, kind="token")
        self.transformer = Transformer(config, rngs, cross_attention=True)

    def __call__(
        self, parts: Mapping[str, Tokens], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "batch latent width"]:
        """The latents of each study, which see that study's tokens alone. `keys`: one a study, of noise in training."""
        projected = [
            replace(parts[name], x=project(parts[name].x) + self.part.all[i].astype(self.dtype))
            for i, (name, project) in enumerate(zip(self.parts, self.project))
        ]
        memory, own = join(projected).padded(), self.latents.all
        latents = jnp.broadcast_to(own, (len(memory.x) * memory.studies, *own.shape)).astype(self.dtype)
        return self.transformer(latents, memory=memory.x, memory_segments=memory.seen_by(len(own)), keys=keys)
