"""Attention with presence masks, the one function that everything attends by, and its layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from mmfm_jax.data.batch import Array
from mmfm_jax.model.layers import Linear, RMSNorm
from mmfm_jax.model.position import rotate


def attention(
    q: Float[Array, "batch query heads head"],
    k: Float[Array, "batch key heads head"],
    v: Float[Array, "batch key heads head"],
    present: Bool[Array, "batch key"] | None = None,
) -> Float[Array, "batch query heads head"]:
    """softmax(q k^T / sqrt(head)) v over the keys present; zero where no key is. Softmax is in float32."""
    if present is None:
        return jax.nn.dot_product_attention(q, k, v)
    out = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(present)[:, None, None, :])
    return jnp.where(jnp.any(present, axis=1)[:, None, None, None], out, 0)


class Attention(nnx.Module):
    """Multi-head attention of `x` over itself or over a memory, with normalised queries and keys (arXiv:2302.05442)."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, memory_width: int | None = None, gain: float = 1.0):
        self.heads = heads
        source = memory_width or width
        self.query = Linear(width, width, ("width", "heads"), rngs)
        self.key = Linear(source, width, ("width", "heads"), rngs)
        self.value = Linear(source, width, ("width", "heads"), rngs)
        self.out = Linear(width, width, ("heads", "width"), rngs, gain=gain)
        self.query_norm = RMSNorm(width // heads)
        self.key_norm = RMSNorm(width // heads)

    def __call__(
        self,
        x: Float[Array, "batch query width"],
        memory: Float[Array, "batch key memory"] | None = None,
        present: Bool[Array, "batch key"] | None = None,
        angles: Float[Array, "#batch query pair"] | None = None,
    ) -> Float[Array, "batch query width"]:
        """`present` says which keys exist; `angles` are rotary positions, of self-attention alone."""
        memory = x if memory is None else memory
        q, k = self.query_norm(self._heads(self.query(x))), self.key_norm(self._heads(self.key(memory)))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out = attention(q, k, self._heads(self.value(memory)), present)
        return self.out(out.reshape(*x.shape[:2], -1))

    def _heads(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens heads head"]:
        return x.reshape(*x.shape[:2], self.heads, -1)
