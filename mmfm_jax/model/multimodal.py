"""The whole model: one encoder a modality and the fusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, PRNGKeyArray

from mmfm_jax.config.model import ModelConfig
from mmfm_jax.data.batch import PAD, Array, Batch, InputSpec, PackedPart
from mmfm_jax.model.fusion import Fusion
from mmfm_jax.model.regularise import fold
from mmfm_jax.model.tabular import TableEncoder
from mmfm_jax.model.text import TextEncoder
from mmfm_jax.model.tokens import Tokens
from mmfm_jax.model.vision import VisionEncoder


@dataclass(frozen=True)
class Hidden:
    """What an encoder is not shown, for masked modelling. Parts that are not named are shown whole."""

    images: dict[str, PackedPart]
    """The patches that remain of each role; the encoder sees them alone."""
    tokens: dict[str, Bool[Array, "batch length"]]
    columns: Bool[Array, "batch column"] | None


Encoded = dict[str, Tokens]
SHOWN = Hidden({}, {}, None)


def modality(part: str) -> str:
    """`image`, `text` or `table`, from the name of a part."""
    return part.split("/")[0]


class MultimodalModel(nnx.Module):
    """Encoders of the modalities that the inputs hold, and their fusion. Expects batches from `transforms.prepare`."""

    def __init__(self, config: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        self.mask_token = spec.mask_token
        dtype = jnp.dtype(config.dtype)
        self.vision = VisionEncoder(config.vision, spec.images, dtype, rngs) if spec.images else None
        self.lengths = tuple(spec.texts.items())
        self.text = TextEncoder(config.text, spec.vocabulary_size, dtype, rngs) if spec.texts else None
        self.table = TableEncoder(config.table, spec, dtype, rngs) if spec.numbers or spec.categories else None
        widths = {f"image/{role}": config.vision.width for role in spec.images}
        widths |= {f"text/{field}": config.text.width for field in spec.texts}
        widths |= {"table": config.table.width} if self.table is not None else {}
        self.fusion = Fusion(config.fusion, widths, dtype, rngs)

    def encode(self, batch: Batch, hidden: Hidden = SHOWN, keys: PRNGKeyArray | None = None) -> Encoded:
        """Tokens of every part, whether present or not; `Tokens.present` tells.

        `keys`: one a study [batch], of dropout and stochastic depth in training."""
        encoded = {}
        if self.vision is not None:
            for role, image in (batch.images | batch.packed | hidden.images).items():
                encoded[f"image/{role}"] = self.vision(role, image, fold(keys, len(encoded)))
        encoded |= self.encode_texts(batch, hidden, keys, len(encoded))
        if self.table is not None:
            x = self.table(batch.table, hidden.columns, fold(keys, len(encoded)))
            encoded["table"] = Tokens(x, jnp.broadcast_to(table_present(batch)[:, None], x.shape[:2]))
        return encoded

    def encode_texts(
        self, batch: Batch, hidden: Hidden = SHOWN, keys: PRNGKeyArray | None = None, first: int = 0
    ) -> Encoded:
        """Of the texts alone; `first`: the number of the first among all parts, by which noise is drawn."""
        encoded, lengths = {}, dict(self.lengths)
        for number, (field, text) in enumerate(batch.texts.items(), first):
            present, tokens = (text.tokens != PAD) & text.present[:, None], text.tokens
            if field in hidden.tokens:
                tokens = jnp.where(hidden.tokens[field], self.mask_token, tokens)
            x = self.text(tokens, present, lengths[field], fold(keys, number))  # pyright: ignore[reportOptionalCall]
            encoded[f"text/{field}"] = Tokens(x, present)
        return encoded

    def fuse(
        self, encoded: Encoded, keep: Mapping[str, Bool[Array, "batch"]] | None = None, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "batch latent width"]:
        """The fused latents of each study; a modality that `keep` denies a study is absent to it. `keys` may be those
        that `encode` was given."""
        keep = keep or {}
        return self.fusion(
            {
                part: tokens.of(keep[modality(part)]) if modality(part) in keep else tokens
                for part, tokens in encoded.items()
            },
            fold(keys, len(encoded)),
        )


def table_present(batch: Batch) -> Bool[Array, "batch"]:
    """Whether a study has any value in its table."""
    return jnp.any(batch.table.number_present, axis=1) | jnp.any(batch.table.category_present, axis=1)


def drop_modalities(encoded: Encoded, chance: float, keys: PRNGKeyArray) -> dict[str, Bool[Array, "batch"]]:
    """Which modalities each study keeps when each is hidden with `chance`; one that is present is always left.

    `keys`: one a study [batch]."""
    held = {}
    for part, tokens in encoded.items():
        held[modality(part)] = held.get(modality(part), False) | tokens.held
    order = jax.vmap(lambda key: jax.random.uniform(key, (len(held),)), out_axes=1)(keys)
    present = jnp.stack(list(held.values()))
    score = jnp.where(present, order, -1)
    kept = (score >= chance) | (score == score.max(axis=0))
    return dict(zip(held, kept))
