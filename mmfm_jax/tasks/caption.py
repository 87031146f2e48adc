"""Captions: a study's text predicted token by token from the fused latents of its other modalities (CoCa,
arXiv:2205.01917)."""

from __future__ import annotations

import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from mmfm_jax.config.model import ModelConfig, TransformerConfig
from mmfm_jax.data.batch import PAD, Array, InputSpec
from mmfm_jax.errors import UserError
from mmfm_jax.losses.mean import Mean
from mmfm_jax.losses.vocabulary import chunked_cross_entropy
from mmfm_jax.metrics.findings import Findings, Forest
from mmfm_jax.metrics.held_out import HeldOut
from mmfm_jax.model.decoder import TextDecoder
from mmfm_jax.tasks.base import Losses, Needs, Scalars, Task, TaskConfig, Views


class CaptionConfig(TaskConfig):
    """Cross-entropy of each next token of one text field, no text being shown to the fusion."""

    kind: Literal["caption"] = "caption"
    """Which task it is."""
    field: str
    """Text field that is written."""
    decoder: TransformerConfig
    """Causal, with cross-attention to the latents in every block."""
    tied: bool = False
    """A token is predicted by the vector that also embeds it."""

    @property
    def aligns_text(self) -> bool:
        return True

    def needs(self) -> Needs:
        return Needs(texts={"field": self.field})

    def stacks(self) -> dict[str, TransformerConfig]:
        return {"decoder": self.decoder}


class Caption(Task):
    Config = CaptionConfig
    config: CaptionConfig

    def __init__(self, name: str, config: CaptionConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        super().__init__(name, config, model, spec, rngs)
        if spec.texts[config.field] < 2:
            raise UserError(
                f"inputs.texts.{config.field}.length: a text of one token leaves nothing for tasks.{name} to predict; "
                "give at least 2"
            )
        self.decoder = TextDecoder(
            config.decoder, spec.vocabulary_size, model.fusion.width, config.tied, jnp.dtype(model.dtype), rngs
        )

    def latents(self, views: Views) -> Float[Array, "batch latent width"]:
        """The fusion of all but the texts; studies without anything else have the latents of nothing."""
        return views.fused(("text",), drop=False)

    def loss(self, views: Views, keys: PRNGKeyArray) -> Losses:
        """Mean over the tokens predicted, and of those the share whose likeliest token is right."""
        entropy, right, asked = self._tokens(views, views.noise(keys))
        return Losses({"loss": Mean.over(entropy, asked)}, {"accuracy": Mean.over(right.astype(jnp.float32), asked)})

    def derived(self, means: Scalars) -> Scalars:
        return {"perplexity": jnp.exp(means["loss"])}

    def _tokens(self, views: Views, noise: PRNGKeyArray | None = None):
        """Of each token: the cross-entropy of the next, whether it is the likeliest, and whether it counts."""
        text = views.batch.texts[self.config.field]
        following, asked = shift(text.tokens, text.present)
        x = self.decoder(text.tokens, self.latents(views), noise)
        return *chunked_cross_entropy(x, *self.decoder.output, following), asked

    def predict(self, views: Views) -> dict[str, Array]:
        """The summed cross-entropy of a study's text, and of how many tokens that is."""
        entropy, _, asked = self._tokens(views)
        return {"nats": jnp.where(asked, entropy, 0).sum(axis=1), "tokens": asked.sum(axis=1)}

    def measure(self, held_out: HeldOut) -> Findings:
        """Perplexity of the tokens of held-out texts, given the other modalities."""
        kept = held_out.predicted["tokens"] > 0
        if not kept.any():
            note = f"{self.name} is left out: no {held_out.split} study has the text {self.config.field}."
            return Findings(notes=(note,))
        counted = functools.partial(
            perplexity, held_out.predicted["nats"][kept].astype(float), held_out.predicted["tokens"][kept]
        )
        found = held_out.bootstrap(counted, held_out.test.patients[kept])
        shown = Forest(
            "Words that come next",
            "Perplexity of a token of a held-out text: as hard to guess as one of so many equally likely.",
            "perplexity",
            {self.name: found},
        )
        return Findings({f"{self.name}/perplexity": found}, (shown,))


def perplexity(
    nats: Float[np.ndarray, "study"], tokens: Int[np.ndarray, "study"], weights: Float[np.ndarray, "resample study"]
) -> Float[np.ndarray, "resample"]:
    """exp of the mean cross-entropy over the tokens of all studies."""
    return np.exp(weights @ nats / np.maximum(weights @ tokens, 1))


def shift(
    tokens: Int[Array, "batch length"], present: Bool[Array, "batch"]
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """The token that follows each, and which of those count: every token of a text after the first, and its end, which
    is one PAD; a text that fills its length has no end. The last token has no following and counts for nothing, so that
    the decoder runs at the whole length, which a mesh divides."""
    following = jnp.pad(jnp.asarray(tokens)[:, 1:], [(0, 0), (0, 1)], constant_values=PAD)
    last = jnp.arange(tokens.shape[1]) == tokens.shape[1] - 1
    return following, (tokens != PAD) & ~last & jnp.asarray(present)[:, None]
