"""Masked multimodal modelling: parts of every modality are hidden and predicted from the fused latents of the rest.

Images as in MAE (arXiv:2111.06377): the encoder sees the kept patches alone, so hiding makes it cheaper. Texts as in
BERT: hidden tokens become the mask token. Columns: value and missingness give way to a learned embedding. Whatever is
hidden of one modality can be read off the others, for the decoder sees nothing but the latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from mmfm_jax.config.model import ModelConfig, TransformerConfig
from mmfm_jax.config.tasks.masked import MaskedConfig
from mmfm_jax.data.batch import PAD, Array, Batch, InputSpec, PackedPart
from mmfm_jax.errors import UserError
from mmfm_jax.losses.mean import Mean
from mmfm_jax.losses.vocabulary import chunked_cross_entropy
from mmfm_jax.model.decoder import Decoder
from mmfm_jax.model.hiding import hide
from mmfm_jax.model.layers import Linear, Table
from mmfm_jax.model.multimodal import Hidden, table_present
from mmfm_jax.model.position import angles_1d, angles_3d, waves
from mmfm_jax.model.readings import one_reading
from mmfm_jax.model.tokens import Tokens, join
from mmfm_jax.model.vision import as_patches
from mmfm_jax.tasks.base import Losses, Task, Views


@dataclass(frozen=True)
class Masks:
    """What is hidden of each study."""

    shown: dict[str, PackedPart]
    """The patches of each role that are not hidden."""
    patches: dict[str, PackedPart]
    """Those that are."""
    tokens: dict[str, tuple[Int[Array, "batch chosen"], Bool[Array, "batch chosen"]]]
    """Positions, and which of them count."""
    columns: Bool[Array, "batch column"]


class Masked(Task):
    Config = MaskedConfig
    config: MaskedConfig

    def __init__(self, name: str, config: MaskedConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        super().__init__(name, config, model, spec, rngs)
        if not (
            (config.image and spec.images)
            or (config.text and spec.texts)
            or (config.table and "table" in spec.modalities)
        ):
            raise UserError(f"tasks.{name}: hides nothing of the inputs; raise image, text or table above 0")
        width, heads = model.fusion.width, model.fusion.heads
        self.wavelengths_mm = model.vision.wavelengths_mm
        self.shapes = tuple(spec.images.items()) if config.image else ()
        self.fields = tuple(spec.texts) if config.text else ()
        self.lengths = tuple(spec.texts.items())
        self.numbers, self.categories = (len(spec.numbers), len(spec.categories)) if config.table else (0, 0)
        self.sizes = tuple(len(v) for v in spec.categories.values()) if config.table else ()
        self.decoder = Decoder(
            TransformerConfig(width=width, depth=config.depth, heads=heads, mlp_ratio=model.fusion.mlp_ratio), rngs
        )
        self.width = width
        parts = len(self.shapes) + len(self.fields) + self.numbers + self.categories
        self.query = Table(parts, width, rngs, kind="token")  # one a role, a field and a column
        self.place = Linear(width, width, ("mlp", "width"), rngs)
        self.voxels = nnx.Dict(
            {
                role: Linear(width, math.prod(shape.patch) * shape.channels, ("width", None), rngs, bias=True)
                for role, shape in self.shapes
            }
        )
        self.tokens: Any = (
            Linear(width, spec.vocabulary_size, ("width", "vocabulary"), rngs, bias=True) if self.fields else None
        )
        columns = self.numbers + sum(self.sizes)
        self.columns = Linear(width, columns, ("width", None), rngs, bias=True) if columns else None

    def loss(self, views: Views, keys: PRNGKeyArray) -> Losses:
        """Squared error of the voxels of images and of standardised numbers, cross-entropy of tokens and of categories:
        a part each, over what is hidden."""
        batch, _ = one_reading(views.batch, dict(self.lengths))
        masks = self._draw(batch, keys)
        hidden = Hidden(
            images=masks.shown,
            tokens={
                field: _marked(chosen, valid, batch.texts[field].tokens.shape[1])
                for field, (chosen, valid) in masks.tokens.items()
            },
            columns=None if self.columns is None else masks.columns,
        )
        noise = views.noise(keys)
        latents = views.model.fuse(views.model.encode(batch, hidden, noise), keys=noise)
        return Losses(self._score(self._decode(latents, masks, batch), masks, batch))

    def part_weight(self, part: str) -> float:
        weights = self.config.weights
        first, _, second = part.partition("/")
        return getattr(weights, second if first == "table" else first)

    def _draw(self, batch: Batch, keys: PRNGKeyArray) -> Masks:
        """What to hide of each study."""
        of_part = jax.vmap(lambda key: jax.random.split(key, len(self.shapes) + len(self.fields) + 1), out_axes=1)(keys)
        shown, patches, tokens = {}, {}, {}
        for own, (role, shape) in zip(of_part, self.shapes):
            whole = batch.packed[role] if role in batch.packed else as_patches(batch.images[role], shape)
            shown[role], patches[role] = hide(whole, self.config.image, math.prod(shape.grid), own)
        for own, field in zip(of_part[len(self.shapes) :], self.fields):
            text = batch.texts[field]
            tokens[field] = choose(own, (text.tokens != PAD) & text.present[:, None], self.config.text)
        count, share = self.numbers + self.categories, self.config.table
        columns = jax.vmap(lambda key: jax.random.bernoulli(key, share, (count,)))(of_part[-1])
        return Masks(shown, patches, tokens, columns)

    def _decode(self, latents: Float[Array, "batch latent width"], masks: Masks, batch: Batch) -> list[jax.Array]:
        """What the decoder answers for each hidden place: of each role (in the rows of its patches), of each field,
        then of all columns."""
        queries = [self._image_queries(i, masks.patches[role]) for i, (role, _) in enumerate(self.shapes)]
        queries += [self._text_queries(i, field, masks.tokens[field][0], batch) for i, field in enumerate(self.fields)]
        if self.columns is not None:
            own = self.query.all[len(self.shapes) + len(self.fields) :]
            queries.append(_of_all(jnp.broadcast_to(own, (len(latents), *own.shape))))
        joined = join(queries).padded()
        joined = replace(joined, x=joined.x.astype(latents.dtype))
        decoded = self.decoder(joined, latents).astype(jnp.float32)
        lengths = [query.in_rows_of(joined.studies).x.shape[1] for query in queries]
        *answers, _ = jnp.split(decoded, np.cumsum(lengths), axis=1)  # padding comes last
        return [answer.reshape(*query.x.shape[:2], -1) for answer, query in zip(answers, queries)]

    def _score(self, answers: list[jax.Array], masks: Masks, batch: Batch) -> dict[str, Mean]:
        remaining, losses = iter(answers), {}
        for role, _ in self.shapes:
            hidden = masks.patches[role]
            target = normalised(hidden.patches) if self.config.normalise else hidden.patches
            error = jnp.square(self.voxels[role](next(remaining)) - target).mean(axis=-1)
            losses[f"image/{role}"] = Mean.over(error, hidden.valid)
        for field in self.fields:
            chosen, valid = masks.tokens[field]
            target = jnp.take_along_axis(batch.texts[field].tokens, chosen, axis=1)
            kernel, bias = self.tokens.kernel[...], self.tokens.bias[...]
            entropy, _ = chunked_cross_entropy(next(remaining), kernel, bias, target)
            losses[f"text/{field}"] = Mean.over(entropy, valid)
        if self.columns is not None:
            losses |= self._column_losses(self.columns(next(remaining)), masks.columns, batch)
        return losses

    def _image_queries(self, part: int, hidden: PackedPart) -> Tokens:
        angles = angles_3d(hidden.centres_mm, self.width, self.wavelengths_mm)
        x = self.query.all[part] + self.place(waves(angles))
        return _of_all(x) if hidden.segment is None else Tokens(x, hidden.segment, hidden.studies)

    def _text_queries(self, index: int, field: str, hidden: Int[Array, "batch hidden"], batch: Batch) -> Tokens:
        angles = jnp.asarray(angles_1d(batch.texts[field].tokens.shape[1], self.width), jnp.float32)
        return _of_all(self.query.all[len(self.shapes) + index] + self.place(waves(angles)[hidden]))

    def _column_losses(
        self, answers: Float[Array, "batch column output"], hidden: Bool[Array, "batch column"], batch: Batch
    ) -> dict[str, Mean]:
        """Each column reads its own outputs: one for a number, one a class for a category."""
        table, held = batch.table, table_present(batch)[:, None]
        losses = {}
        if self.numbers:
            own = jnp.arange(self.numbers)
            error = jnp.square(answers[:, own, own] - table.numbers)
            losses["table/numbers"] = Mean.over(error, hidden[:, : self.numbers] & table.number_present & held)
        first, entropies = self.numbers, []
        for i, size in enumerate(self.sizes):
            logits = answers[:, self.numbers + i, first : first + size]
            entropies.append(optax.softmax_cross_entropy_with_integer_labels(logits, table.categories[:, i]))
            first += size
        if entropies:
            asked = hidden[:, self.numbers :] & table.category_present & held
            losses["table/categories"] = Mean.over(jnp.stack(entropies, axis=1), asked)
        return losses


def _of_all(x: Float[Array, "batch query width"]) -> Tokens:
    """Queries that every study has."""
    return Tokens(x, jnp.ones(x.shape[:2], jnp.int32))


def normalised(patches: Float[Array, "*rows voxel"]) -> Float[Array, "*rows voxel"]:
    """Each patch less its mean and over its standard deviation (MAE, arXiv:2111.06377); 0 of one that does not vary."""
    mean = patches.mean(axis=-1, keepdims=True)
    variance = jnp.square(patches - mean).mean(axis=-1, keepdims=True)
    return (patches - mean) * jax.lax.rsqrt(variance + 1e-6)


def choose(
    keys: PRNGKeyArray, present: Bool[Array, "batch position"], share: float
) -> tuple[Int[Array, "batch chosen"], Bool[Array, "batch chosen"]]:
    """A random `share` of the positions present in each row, at least one of those: positions, and which count.

    `keys`: one a row. The number of columns is that of a full row, so that shapes are static.
    """
    drawn = jax.vmap(lambda key: jax.random.uniform(key, present.shape[1:]))(keys)
    score = jnp.where(present, drawn, 2.0)
    width = max(math.ceil(share * present.shape[1]), 1)
    chosen = score.argsort(axis=1)[:, :width]
    held = present.sum(axis=1, keepdims=True)
    wanted = jnp.minimum(jnp.maximum(jnp.round(share * held), 1), held)
    return chosen, jnp.arange(width) < wanted


def _marked(chosen: Int[Array, "batch chosen"], valid: Bool[Array, "batch chosen"], length: int):
    """The chosen positions that count, as a mask over all positions."""
    return ((chosen[:, :, None] == jnp.arange(length)) & valid[:, :, None]).any(axis=1)
