"""Captions: a study's text foretold token by token from the fused latents of its other modalities (CoCa,
arXiv:2205.01917)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from mmfm_jax.config.model import ModelConfig, TransformerConfig
from mmfm_jax.data.batch import PAD, Array, InputSpec
from mmfm_jax.errors import UserError
from mmfm_jax.losses.mean import mean_where
from mmfm_jax.losses.vocabulary import chunked_cross_entropy
from mmfm_jax.model.decoder import TextDecoder
from mmfm_jax.tasks.base import Metrics, Task, TaskConfig, Views


class CaptionConfig(TaskConfig):
    """Cross-entropy of each next token of one text field, no text being shown to the fusion."""

    kind: Literal["caption"] = "caption"
    field: str
    decoder: TransformerConfig
    """Causal, with cross-attention to the latents in every block."""
    tied: bool = False
    """A token is foretold by the vector that also embeds it."""


class Caption(Task):
    Config = CaptionConfig
    config: CaptionConfig

    def __init__(self, name: str, config: CaptionConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        super().__init__(name, config, model, spec, rngs)
        if config.field not in spec.texts:
            held = ", ".join(spec.texts) or "none"
            raise UserError(f"tasks.{name}.field: the inputs hold no text {config.field}; they hold {held}")
        if spec.texts[config.field] < 2:
            raise UserError(
                f"inputs.texts.{config.field}.length: a text of one token leaves nothing for tasks.{name} to foretell; "
                "give at least 2"
            )
        self.decoder = TextDecoder(
            config.decoder, spec.vocabulary_size, model.fusion.width, config.tied, jnp.dtype(model.dtype), rngs
        )

    def latents(self, views: Views) -> Float[Array, "batch latent width"]:
        """The fusion of all but the texts; studies without anything else have the latents of nothing."""
        return views.model.fuse(views.encoded, {"text": jnp.zeros(views.batch.study.shape, bool)})

    def loss(self, views: Views, rng: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        """Mean over the tokens foretold, and of those the share whose likeliest token is right."""
        text = views.batch.texts[self.config.field]
        shown, following, asked = shift(text.tokens, text.present)
        x = self.decoder(shown, self.latents(views))
        entropy, right = chunked_cross_entropy(x, *self.decoder.output, following)
        loss = mean_where(entropy, asked)
        return loss, {"accuracy": mean_where(right.astype(jnp.float32), asked), "perplexity": jnp.exp(loss)}


def shift(
    tokens: Int[Array, "batch length"], present: Bool[Array, "batch"]
) -> tuple[Int[Array, "batch shown"], Int[Array, "batch shown"], Bool[Array, "batch shown"]]:
    """Tokens but the last, the one that follows each, and which of those count: every token of a text after the first,
    and its end, which is one PAD; a text that fills its length has no end."""
    shown = tokens[:, :-1]
    return shown, tokens[:, 1:], (shown != PAD) & jnp.asarray(present)[:, None]
