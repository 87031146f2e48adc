"""Contrast of two modalities of a study: sigmoid (SigLIP, arXiv:2303.15343) or softmax (CLIP, arXiv:2103.00020)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt32
from pydantic import PositiveFloat, PositiveInt, model_validator

from mmfm_jax.config.model import ModelConfig
from mmfm_jax.data.batch import Array, Batch, InputSpec
from mmfm_jax.errors import UserError
from mmfm_jax.losses.pairs import contrast
from mmfm_jax.model.attention import Attention
from mmfm_jax.model.layers import Linear, RMSNorm, Table
from mmfm_jax.model.multimodal import Encoded, modality
from mmfm_jax.model.tokens import Tokens, join
from mmfm_jax.tasks.base import Metrics, Task, TaskConfig, Views

Modality = Literal["image", "text", "table"]
LARGEST_SCALE = 100.0  # as in CLIP


class ContrastiveConfig(TaskConfig):
    """Two modalities of one study are drawn together, those of different studies apart."""

    kind: Literal["contrastive"] = "contrastive"
    between: tuple[Modality, Modality] = ("image", "text")
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    """Each pair judged by itself (SigLIP), or each study's partner chosen among the batch (CLIP)."""
    width: PositiveInt = 128
    """Of the space in which the two meet."""
    initial_scale: PositiveFloat = 10.0
    """Of the similarities: the inverse of the softmax's temperature."""
    initial_bias: float = -10.0
    """Sigmoid only: start near -log(studies a step), where every pair is as likely a match as it truly is."""
    mask_duplicates: bool = False
    """Pairs of different studies whose texts are identical are not counted as negatives."""

    @model_validator(mode="after")
    def _two(self):
        if self.between[0] == self.between[1]:
            raise ValueError(f"between names {self.between[0]} twice; name two modalities")
        return self


class Pool(nnx.Module):
    """One learned query attends to all tokens of a modality; its answer is mapped to a unit vector."""

    def __init__(self, width: int, heads: int, embedding: int, rngs: nnx.Rngs):
        self.query = Table(1, width, rngs)
        self.attend = Attention(width, heads, rngs)
        self.norm = RMSNorm(width)
        self.project = Linear(width, embedding, ("width", None), rngs)

    def __call__(self, tokens: Tokens) -> Float[Array, "batch embedding"]:
        query = jnp.broadcast_to(self.query.all, (len(tokens.x) * tokens.studies, *self.query.all.shape))
        seen = self.attend(query.astype(tokens.x.dtype), tokens.x, tokens.seen_by(1))
        pooled = self.project(self.norm(seen[:, 0])).astype(jnp.float32)
        return pooled * jax.lax.rsqrt(jnp.square(pooled).sum(axis=-1, keepdims=True) + 1e-12)


class Contrastive(Task):
    Config = ContrastiveConfig
    config: ContrastiveConfig

    def __init__(self, name: str, config: ContrastiveConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        super().__init__(name, config, model, spec, rngs)
        for side in config.between:
            if side not in spec.modalities:
                held = ", ".join(spec.modalities)
                raise UserError(f"tasks.{name}.between: the inputs hold no {side}; they hold {held}")
        encoders = {"image": model.vision, "text": model.text, "table": model.table}
        self.pool = nnx.Dict(
            {side: Pool(encoders[side].width, encoders[side].heads, config.width, rngs) for side in config.between}
        )
        sigmoid = config.loss == "sigmoid"
        self.log_scale = nnx.Param(jnp.log(config.initial_scale), axes=())
        self.bias = nnx.Param(jnp.array(config.initial_bias), axes=()) if sigmoid else None

    def embed(self, views: Views) -> dict[str, tuple[Float[Array, "batch embedding"], Bool[Array, "batch"]]]:
        """The unit vector of each side, and whether the study has that side."""
        return {side: self._embed(side, views.encoded) for side in self.config.between}

    def _embed(self, side: str, encoded: Encoded):
        tokens = join([tokens for part, tokens in encoded.items() if modality(part) == side])
        return self.pool[side](tokens), tokens.held

    def loss(self, views: Views, rng: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        (a, a_present), (b, b_present) = self.embed(views).values()
        duplicates = self.config.mask_duplicates and "text" in self.config.between
        scale = jnp.minimum(jnp.exp(self.log_scale[...]), LARGEST_SCALE)
        loss, accuracy = contrast(
            self.config.loss, a, b, a_present & b_present, scale, None if self.bias is None else self.bias[...],
            text_hash(views.batch) if duplicates else None,
        )  # fmt: skip
        return loss, {"accuracy": accuracy, "scale": scale}


def text_hash(batch: Batch) -> UInt32[Array, "batch 2"]:
    """64 bits of each study's tokens in every text field."""
    tokens = jnp.concatenate([text.tokens for _, text in sorted(batch.texts.items())], axis=1).astype(jnp.uint32)
    salt = np.random.default_rng(0).integers(1, 2**32, (2, tokens.shape[1]), dtype=np.uint32) | np.uint32(1)
    return jnp.stack([_mixed(tokens, row) for row in salt], axis=1)


def _mixed(tokens, salt):
    """A 32-bit hash of each row: products with odd salts, scrambled before they are summed."""
    x = (tokens + 1) * salt
    x = (x ^ (x >> 15)) * jnp.uint32(0x2C1B3C6D)
    x = (x ^ (x >> 12)) * jnp.uint32(0x297A2D39)
    return (x ^ (x >> 15)).sum(axis=1, dtype=jnp.uint32)
