"""One vector of many tokens."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from mmfm_jax.data.batch import Array
from mmfm_jax.model.attention import Attention
from mmfm_jax.model.layers import RMSNorm, Table
from mmfm_jax.model.tokens import Tokens


class AttentionPool(nnx.Module):
    """One learned query attends to all tokens of a study; its answer is normalised (arXiv:1810.00825)."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.query = Table(1, width, rngs, kind="token")
        self.attend = Attention(width, heads, rngs)
        self.norm = RMSNorm(width)

    def __call__(self, tokens: Tokens) -> Float[Array, "study width"]:
        query = jnp.broadcast_to(self.query.all, (len(tokens.x) * tokens.studies, *self.query.all.shape))
        seen = self.attend(query.astype(tokens.x.dtype), tokens.x, tokens.seen_by(1))
        return self.norm(seen[:, 0])
