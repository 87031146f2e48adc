"""Attention, the one function that everything attends by, and its layer."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from mmfm_jax.data.batch import Array
from mmfm_jax.model.flash import ALL, SCORES, Segments
from mmfm_jax.model.head_layout import LANES, heads_of
from mmfm_jax.model.layers import Linear, RMSNorm
from mmfm_jax.model.ring import SAVED, blockwise
from mmfm_jax.parallel.platform import platform
from mmfm_jax.parallel.sharding import split_over

Implementation = Literal["auto", "xla", "blocks", "cudnn", "splash"]


def attention(
    q: Float[Array, "batch query heads head"],
    k: Float[Array, "batch key heads head"],
    v: Float[Array, "batch key heads head"],
    segments: Segments = ALL,
    causal: bool = False,
    implementation: Implementation = "auto",
) -> Float[Array, "batch query heads head"]:
    """softmax(q k^T) v over the keys that a query meets; zero where it meets none. Softmax is in float32.

    It divides by nothing: queries come divided by sqrt(head), which the layer does where it scales them anyway.
    A query meets the keys of its own segment (0 is absent), and if `causal` none after it.
    `implementation` is chosen by platform, shape and mask unless it is named:

    - `xla`: all scores at once; left to the partitioner.
    - `blocks`: some queries at a time, in XLA.
    - `cudnn`: cuDNN's flash attention, on NVIDIA GPUs, in 16 bits.
    - `splash`: JAX's Pallas kernel, on TPUs.
    """
    if implementation == "auto":
        implementation = choose(q, k, segments, causal)
    if implementation in ("blocks", "splash"):
        return blockwise("splash" if implementation == "splash" else "xla", q, k, v, segments, causal)
    if segments.keys is None:
        out = jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=causal, implementation=implementation)
        return checkpoint_name(out, SAVED)
    meets = jnp.asarray(segments.keys > 0)[:, None, None, :]
    if segments.queries is not None:
        meets &= segments.queries[:, None, :, None] == segments.keys[:, None, None, :]
    if causal:
        meets &= jnp.arange(k.shape[1]) <= jnp.arange(q.shape[1])[:, None]
    if implementation == "cudnn":  # its mask has a row a query
        meets = jnp.broadcast_to(meets, (len(q), 1, q.shape[1], k.shape[1]))
    out = jax.nn.dot_product_attention(q, k, v, scale=1.0, mask=meets, implementation=implementation)
    return checkpoint_name(jnp.where(meets.any(axis=-1).swapaxes(1, 2)[..., None], out, 0), SAVED)


def choose(q, k, segments: Segments, causal: bool) -> Literal["xla", "blocks", "cudnn", "splash"]:
    """The implementation that fits the platform traced for, the shapes and the mask."""
    where, (batch, queries, heads, head), keys = platform(), q.shape, k.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    tokens_split = not mesh.empty and not causal and split_over("tokens", keys, mesh)
    if where == "tpu" and min(queries, keys) >= LANES:
        return "splash"
    if tokens_split and (queries > 1 or batch * heads * keys > SCORES):
        return "blocks"
    # cuDNN takes segments as a mask of every query and key, which long packed sequences cannot afford.
    affordable = segments.queries is None or batch * queries * keys <= SCORES
    if where == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and head % 8 == 0 and head <= 128 and affordable:
        return "cudnn"
    return "xla" if batch * heads * queries * keys <= SCORES * (mesh.size or 1) else "blocks"


class Attention(nnx.Module):
    """Multi-head attention of `x` over itself or over a memory, with normalised queries and keys (arXiv:2302.05442)."""

    def __init__(
        self,
        width: int,
        heads: int,
        rngs: nnx.Rngs,
        memory_width: int | None = None,
        gain: float = 1.0,
        causal: bool = False,
        implementation: Implementation = "auto",
    ):
        self.heads, self.causal = heads, causal
        self.implementation: Implementation = implementation
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
        segments: Segments = ALL,
        angles: Float[Array, "#batch query pair"] | None = None,
    ) -> Float[Array, "batch query width"]:
        """`angles` are rotary positions, of self-attention alone.

        A memory of fewer rows than `x` is packed: consecutive rows of `x`, equally many, query one row of it side by
        side, and `segments` are of those.
        """
        memory = x if memory is None else memory
        scale = self.query_norm.scale[...] * (x.shape[-1] // self.heads) ** -0.5
        q = heads_of(self.query(x), self.heads, scale, angles)
        k = heads_of(self.key(memory), self.heads, self.key_norm.scale[...], angles)
        v = self.value(memory).reshape(*memory.shape[:2], self.heads, -1)
        q = q.reshape(len(memory), -1, *q.shape[2:])
        out = attention(q, k, v, segments, self.causal, self.implementation)
        return self.out(out.reshape(*x.shape[:2], -1))
