"""The one transformer: pre-norm blocks, stacked and scanned, that every encoder, the fusion and the decoders use."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, PRNGKeyArray

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.data.batch import Array
from mmfm_jax.errors import UserError
from mmfm_jax.model.attention import Attention
from mmfm_jax.model.flash import ALL, Segments
from mmfm_jax.model.layers import STATISTIC, LayerScale, Linear, RMSNorm, stack
from mmfm_jax.model.precision import check_installed
from mmfm_jax.model.regularise import noise_of
from mmfm_jax.model.ring import SAVED
from mmfm_jax.parallel.loops import scan
from mmfm_jax.parallel.sharding import constrain

HIDDEN = "hidden"  # name of what the first product of an MLP gives

REMAT = {  # what backward keeps of a block besides its input, by `TransformerConfig.remat`
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED, STATISTIC),
    ),
    "hidden": jax.checkpoint_policies.save_only_these_names(SAVED, STATISTIC, HIDDEN),
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED, STATISTIC),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # the input itself, in host memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class MLP(nnx.Module):
    """GELU, or gated GELU (GEGLU, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, gated: bool, rngs: nnx.Rngs, gain: float):
        self.up = Linear(width, hidden, ("width", "mlp"), rngs)
        self.gate = Linear(width, hidden, ("width", "mlp"), rngs) if gated else None
        self.down = Linear(hidden, width, ("mlp", "width"), rngs, gain=gain)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        hidden = checkpoint_name(self.up(x), HIDDEN)
        if self.gate is None:
            return self.down(jax.nn.gelu(hidden))
        return self.down(jax.nn.gelu(checkpoint_name(self.gate(x), HIDDEN)) * hidden)


class Block(nnx.Module):
    """x + cross(norm x, memory), then x + attend(norm x), then x + mlp(norm x); either attention may be left out."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, own: bool, cross: bool, causal: bool):
        width, gain = config.width, (2 * config.depth) ** -0.5  # keeps the sum over all blocks near unit scale
        attention = functools.partial(Attention, width, config.heads, rngs, gain=gain, implementation=config.attention)
        self.attend = attention(causal=causal) if own else None
        self.attend_norm = RMSNorm(width) if own else None
        self.cross = attention() if cross else None
        self.cross_norm = RMSNorm(width) if cross else None
        self.mlp = MLP(width, round(config.mlp_ratio * width), config.gated, rngs, gain)
        self.mlp_norm = RMSNorm(width)
        scale = None if config.layer_scale is None else functools.partial(LayerScale, width, config.layer_scale)
        self.cross_scale = scale() if scale and cross else None
        self.attend_scale = scale() if scale and own else None
        self.mlp_scale = scale() if scale else None
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Linear):
                module.precision = config.precision

    def __call__(self, x, segments, angles, memory, memory_segments, noise: Callable | None = None):
        """`noise(branch, x)`: what training leaves of a branch, by its number."""

        def regularised(branch: int, x, scale: LayerScale | None):
            x = x if scale is None else scale(x)
            return x if noise is None else noise(branch, x)

        if self.cross is not None and self.cross_norm is not None:
            x = x + regularised(0, self.cross(self.cross_norm(x), memory, memory_segments), self.cross_scale)
        if self.attend is not None and self.attend_norm is not None:
            attended = self.attend(self.attend_norm(x), segments=segments, angles=angles)
            x = x + regularised(1, attended, self.attend_scale)
        return constrain(x + regularised(2, self.mlp(self.mlp_norm(x)), self.mlp_scale), "batch", "tokens", None)


class Transformer(nnx.Module):
    """`config.depth` blocks and a final norm. Compile time grows with `config.unroll`, not with depth."""

    def __init__(
        self, config: TransformerConfig, rngs: nnx.Rngs, self_attention=True, cross_attention=False, causal=False
    ):
        """`causal`: no token attends to those after it.

        Raises UserError when the machine lacks what `config.remat` or `config.precision` needs.
        """
        check_installed(config.precision)
        memories = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
        if config.remat == "offload" and "pinned_host" not in memories:
            raise UserError(
                f"model: {jax.default_backend()} has no pinned_host memory for remat offload; use remat full"
            )
        self.config, self.remat = config, config.remat
        self.blocks = stack(
            lambda rngs: Block(config, rngs, self_attention, cross_attention, causal), config.depth, rngs
        )
        self.norm = RMSNorm(config.width)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        segments: Segments = ALL,
        angles: Float[Array, "#batch tokens pair"] | None = None,
        memory: Float[Array, "batch key width"] | None = None,
        memory_segments: Segments = ALL,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """`keys`: one a study, of dropout and stochastic depth; without them there is neither. Of several studies in a
        row, `segments` tells their tokens apart."""
        graph, layers = nnx.split(self.blocks)
        noise, numbers = None, None
        if keys is not None and (self.config.dropout or self.config.drop_path):
            noise, numbers = noise_of(keys, segments.queries, x.shape[:2], self.config), jnp.arange(self.config.depth)

        def apply(x, numbered):
            layer, number = numbered
            x = checkpoint_name(x, "block")
            of_block = None if noise is None else functools.partial(noise, number)
            return nnx.merge(graph, layer)(x, segments, angles, memory, memory_segments, of_block), None

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT[self.remat], prevent_cse=False)
        x, _ = scan(apply, constrain(x, "batch", "tokens", None), (layers, numbers), unroll=self.config.unroll)
        return self.norm(x)
