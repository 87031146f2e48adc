"""One text of those of a study that stand side by side, for tasks to which the others would tell too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Bool

from mmfm_jax.data.batch import PAD, Array, Batch, TextPart


def one_reading(batch: Batch, lengths: Mapping[str, int], number: int = 0) -> tuple[Batch, Bool[Array, "batch"]]:
    """Each field with its text of that number, or with its first if no text of the field has one, and which studies
    have a text of that number. `lengths`: tokens of a text of each field."""
    texts, held = {}, jnp.zeros(batch.study.shape, bool)
    for field, text in batch.texts.items():
        length = lengths[field]
        first = number * length
        there = first < text.tokens.shape[1]
        tokens = text.tokens[:, first : first + length] if there else text.tokens[:, :length]
        digest = text.digest[:, 2 * number : 2 * number + 2] if there else text.digest[:, :2]
        present = (tokens != PAD).any(axis=1) & text.present
        held = held | present if there else held
        texts[field] = TextPart(tokens, present, digest)
    return replace(batch, texts=texts), held


def excerpts(batch: Batch, lengths: Mapping[str, int]) -> Batch:
    """Each field with an excerpt of its first text; with that where none was drawn."""
    first, _ = one_reading(batch, lengths)
    texts = {
        field: text if batch.texts[field].excerpt is None else replace(text, tokens=batch.texts[field].excerpt)
        for field, text in first.texts.items()
    }
    return replace(batch, texts=texts)
