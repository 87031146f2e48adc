"""A batch of studies as arrays, and the specification that says what the arrays mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, dataclass_transform

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import BaseModel, ConfigDict

Array: TypeAlias = jax.Array | np.ndarray
PAD = 0  # token id of padding, in every tokenizer


@dataclass_transform(frozen_default=True)
def _pytree(cls):
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@_pytree
class ImagePart:
    """One image role of a batch."""

    voxels: Shaped[Array, "batch z y x channel"]
    """Raw dtype on the host and over the wire; windowed to [0, 1] by `transforms.prepare`."""
    spacing_mm: Float[Array, "batch 3"]
    present: Bool[Array, "batch"]


@_pytree
class TextPart:
    """One text field of a batch."""

    tokens: Int[Array, "batch length"]
    """Token ids; PAD after the end."""
    present: Bool[Array, "batch"]


@_pytree
class TablePart:
    """The table row of each study: numbers and categories in the order of `InputSpec`."""

    numbers: Float[Array, "batch number"]
    """In their column's unit; standardised by `transforms.prepare`."""
    number_present: Bool[Array, "batch number"]
    categories: Int[Array, "batch category"]
    """Index into the column's vocabulary."""
    category_present: Bool[Array, "batch category"]


@_pytree
class LabelPart:
    value: Int[Array, "batch"]
    """Index into the label's classes."""
    present: Bool[Array, "batch"]


@_pytree
class Batch:
    """Studies side by side. Absent parts hold zeros that no output may depend on."""

    study: Int[Array, "batch"]
    """Row of the study in the store; -1 pads the last batch of an evaluation."""
    images: dict[str, ImagePart]
    texts: dict[str, TextPart]
    table: TablePart
    labels: dict[str, LabelPart]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageShape(_Frozen):
    size: tuple[int, int, int]
    patch: tuple[int, int, int]
    channels: int
    window: tuple[float, float]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along z y x."""
        z, y, x = (s // p for s, p in zip(self.size, self.patch))
        return z, y, x


class NumberStats(_Frozen):
    mean: float
    sd: float


class InputSpec(_Frozen):
    """What a model was built for: shapes, vocabularies and normalisation. Saved with the run as `inputs.json`."""

    images: dict[str, ImageShape]
    texts: dict[str, int]
    """Tokens of each field."""
    vocabulary_size: int
    """Of the tokenizer."""
    mask_token: int
    """Token id that stands for a hidden token."""
    numbers: dict[str, NumberStats]
    categories: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[str, ...]]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of image, text, table that the inputs hold."""
        held = {"image": self.images, "text": self.texts, "table": self.numbers or self.categories}
        return tuple(name for name, parts in held.items() if parts)
