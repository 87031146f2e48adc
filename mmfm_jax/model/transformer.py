"""The one transformer: pre-norm blocks, stacked and scanned, that every encoder, the fusion and the decoders use."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Bool, Float

from mmfm_jax.config import TransformerConfig
from mmfm_jax.data.batch import Array
from mmfm_jax.model.attention import Attention
from mmfm_jax.model.layers import Linear, RMSNorm, stack
from mmfm_jax.parallel.sharding import constrain

REMAT = {  # what backward keeps of a block, by `TransformerConfig.remat`
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class MLP(nnx.Module):
    """GELU, or gated GELU (GEGLU, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, gated: bool, rngs: nnx.Rngs, gain: float):
        self.up = Linear(width, hidden, ("width", "mlp"), rngs)
        self.gate = Linear(width, hidden, ("width", "mlp"), rngs) if gated else None
        self.down = Linear(hidden, width, ("mlp", "width"), rngs, gain=gain)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        hidden = jax.nn.gelu(self.up(x)) if self.gate is None else jax.nn.gelu(self.gate(x)) * self.up(x)
        return self.down(hidden)


class Block(nnx.Module):
    """x + attend(norm x), then x + attend(norm x, memory), then x + mlp(norm x); either attention may be left out."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, self_attention: bool, cross_attention: bool):
        width, gain = config.width, (2 * config.depth) ** -0.5  # keeps the sum over all blocks near unit scale
        self.attend = Attention(width, config.heads, rngs, gain=gain) if self_attention else None
        self.attend_norm = RMSNorm(width) if self_attention else None
        self.cross = Attention(width, config.heads, rngs, gain=gain) if cross_attention else None
        self.cross_norm = RMSNorm(width) if cross_attention else None
        self.mlp = MLP(width, round(config.mlp_ratio * width), config.gated, rngs, gain)
        self.mlp_norm = RMSNorm(width)

    def __call__(self, x, present, angles, memory, memory_present):
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), memory, memory_present)
        if self.attend is not None and self.attend_norm is not None:
            x = x + self.attend(self.attend_norm(x), present=present, angles=angles)
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "tokens", None)


class Transformer(nnx.Module):
    """`config.depth` blocks and a final norm. Compile time grows with `config.unroll`, not with depth."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, self_attention=True, cross_attention=False):
        self.remat, self.unroll = config.remat, config.unroll
        self.blocks = stack(lambda rngs: Block(config, rngs, self_attention, cross_attention), config.depth, rngs)
        self.norm = RMSNorm(config.width)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        present: Bool[Array, "batch tokens"] | None = None,
        angles: Float[Array, "#batch tokens pair"] | None = None,
        memory: Float[Array, "batch key width"] | None = None,
        memory_present: Bool[Array, "batch key"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        graph, layers = nnx.split(self.blocks)

        def apply(x, layer):
            return nnx.merge(graph, layer)(x, present, angles, memory, memory_present), None

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT[self.remat], prevent_cse=False)
        x, _ = jax.lax.scan(apply, constrain(x, "batch", "tokens", None), layers, unroll=self.unroll)
        return self.norm(x)
