"""The decoders, which know of a study what its fused latents say: of hidden places, and of a text word by word."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int, PRNGKeyArray

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.data.batch import PAD, Array
from mmfm_jax.model.flash import Segments
from mmfm_jax.model.layers import Linear, Table
from mmfm_jax.model.position import angles_1d
from mmfm_jax.model.tokens import Tokens
from mmfm_jax.model.transformer import Transformer


class Decoder(nnx.Module):
    """Of masked modelling: each query names a hidden place. Queries attend to the latents and not to one another, so
    each is predicted on its own."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.transformer = Transformer(config, rngs, self_attention=False, cross_attention=True)

    def __call__(self, queries: Tokens, latents: Float[Array, "batch latent width"]) -> Float[Array, "row query width"]:
        """What each query finds in the latents of its study."""
        if queries.studies == 1:
            return self.transformer(queries.x, memory=latents)
        memory = Tokens(latents, jnp.ones(latents.shape[:2], jnp.int32)).in_rows_of(queries.studies)
        segments = Segments(jnp.asarray(queries.segment), memory.segment)
        return self.transformer(queries.x, memory=memory.x, memory_segments=segments)


class TextDecoder(nnx.Module):
    """Of captions: a token attends to those before it and to the latents (CoCa, arXiv:2205.01917), and foretells the
    next. The first token of a text is given; PAD after the last means that the text has ended."""

    def __init__(
        self,
        config: TransformerConfig,
        vocabulary_size: int,
        latent_width: int,
        tied: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """`tied`: a token is foretold by the vector that also embeds it."""
        self.config, self.dtype = config, dtype
        self.embed = Table(vocabulary_size, config.width, rngs, kind="embedding", axis="vocabulary")
        self.memory = Linear(latent_width, config.width, ("mlp", "width"), rngs)
        self.transformer = Transformer(config, rngs, cross_attention=True, causal=True)
        self.head = None if tied else Linear(config.width, vocabulary_size, ("width", "vocabulary"), rngs, bias=True)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        latents: Float[Array, "batch latent latent_width"],
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch length width"]:
        """At each token, what `output` turns into the logits of the next. `keys`: one a study, of noise in training."""
        angles = angles_1d(tokens.shape[1], self.config.width // self.config.heads)[None]
        x, memory = self.embed(tokens).astype(self.dtype), self.memory(latents.astype(self.dtype))
        return self.transformer(x, angles=jnp.asarray(angles, jnp.float32), memory=memory, keys=keys)

    @property
    def output(self) -> tuple[Float[Array, "width entry"], Float[Array, "entry"] | None]:
        """Kernel and bias of the logits."""
        if self.head is None or self.head.bias is None:
            return self.embed.all.T, None
        return self.head.kernel[...], self.head.bias[...]

    def logits(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch entry"]:
        """Of the whole vocabulary, in float32."""
        kernel, bias = self.output
        product = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return product if bias is None else product + bias

    def generate(
        self, latents: Float[Array, "batch latent latent_width"], start: Int[Array, "batch"], length: int
    ) -> Int[Array, "batch length"]:
        """The likeliest token each time, from the `start` tokens on; PAD after the end.

        Every token costs a pass over the whole text, since keys and values are not kept.
        """
        tokens = jnp.full((len(start), length), PAD, jnp.int32).at[:, 0].set(start)

        def extend(at, tokens):
            before = jax.lax.dynamic_index_in_dim(self(tokens, latents), at - 1, axis=1, keepdims=False)
            following = self.logits(before).argmax(axis=-1).astype(jnp.int32)
            return tokens.at[:, at].set(jnp.where(tokens[:, at - 1] == PAD, PAD, following))

        return jax.lax.fori_loop(1, length, extend, tokens)
