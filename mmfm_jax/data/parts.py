"""What `batch.py` declares, without JAX: processes that read studies never import it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt32
from pydantic import BaseModel, ConfigDict

from mmfm_jax.config.inputs import Window, ZScore, as_channels

if TYPE_CHECKING:
    import jax

Array: TypeAlias = "jax.Array | np.ndarray"
PAD = 0  # token id of padding, in every tokenizer


@dataclass(frozen=True)
class ImagePart:
    """One image role of a batch."""

    voxels: Shaped[Array, "batch z y x channel"]
    """Raw dtype on the host and over the wire; windowed to [0, 1] by `transforms.prepare`."""
    spacing_mm: Float[Array, "batch 3"]
    present: Bool[Array, "batch"]
    limits: Float[Array, "batch 2"] | None = None
    """Raw values of each volume that map to 0 and 1 where it has its own; None where the window is the role's."""


@dataclass(frozen=True)
class PackedPart:
    """One image role of a batch as patches: rows of tokens, in each of which consecutive studies stand side by side.

    Study i is in row i // studies, as segment 1 + i % studies; its patches are contiguous, in z y x order.
    """

    patches: Shaped[Array, "row token voxel"]
    """The voxels of each patch. Raw dtype on the host and over the wire; windowed by `transforms.prepare`."""
    centres_mm: Float[Array, "row token 3"]
    """z y x of the centre of each patch, from the centre of the crop."""
    segment: Int[Array, "row token"] | None
    """The study of each token, counted from 1 in its row; 0 is padding. None: a study a row, and no padding."""
    present: Bool[Array, "batch"]
    limits: Float[Array, "batch 2"] | None = None
    """As those of `ImagePart`."""

    @property
    def studies(self) -> int:
        """Of a row."""
        return len(self.present) // len(self.patches)

    def by_token(self, values: Shaped[Array, "batch *value"]) -> Shaped[jax.Array, "row token *value"]:
        """What each token's study has; anything for padding."""
        import jax.numpy as jnp

        values = jnp.asarray(values)
        if self.segment is None:
            return jnp.broadcast_to(values[:, None], (*self.patches.shape[:2], *values.shape[1:]))
        of_row = values.reshape(len(self.patches), self.studies, *values.shape[1:])
        index = jnp.maximum(self.segment - 1, 0)
        return jnp.take_along_axis(of_row, index.reshape(*index.shape, *[1] * (values.ndim - 1)), axis=1)

    @property
    def valid(self) -> Bool[Array, "row token"]:
        """Tokens of images that are there."""
        present = self.by_token(self.present)
        return present if self.segment is None else present & (self.segment > 0)


@dataclass(frozen=True)
class TextPart:
    """One text field of a batch."""

    tokens: Int[Array, "batch length"]
    """Token ids; PAD after the end. Several texts of a study stand side by side, each with room of its own."""
    present: Bool[Array, "batch"]
    digest: UInt32[Array, "batch word"]
    """64 bits, two words, of each whole text, of which `tokens` may hold some sentences alone; 0 where absent."""
    excerpt: Int[Array, "batch text_length"] | None = None
    """In training, some sentences of the first text; None where nothing asks for them."""


@dataclass(frozen=True)
class TablePart:
    """The table row of each study: numbers and categories in the order of `InputSpec`."""

    numbers: Float[Array, "batch number"]
    """In their column's unit; standardised by `transforms.prepare`."""
    number_present: Bool[Array, "batch number"]
    categories: Int[Array, "batch category"]
    """Index into the column's vocabulary."""
    category_present: Bool[Array, "batch category"]


@dataclass(frozen=True)
class LabelPart:
    value: Int[Array, "batch"]
    """Index into the label's classes."""
    present: Bool[Array, "batch"]


@dataclass(frozen=True)
class Batch:
    """Studies side by side. Absent parts hold zeros that no output may depend on."""

    study: Int[Array, "batch"]
    """Row of the study in the store; -1 pads the last batch of an evaluation."""
    images: dict[str, ImagePart]
    texts: dict[str, TextPart]
    table: TablePart
    labels: dict[str, LabelPart]
    packed: dict[str, PackedPart] = field(default_factory=dict)
    """Image roles of which several studies may share a row; a role is here or in `images`."""
    source: Int[Array, "batch"] | None = None
    """Which store each study is of, in the order of `data.mix`'s names; None where there is one store."""


PARTS = (ImagePart, PackedPart, TextPart, TablePart, LabelPart, Batch)
"""Those that are made of arrays, which `batch.py` makes known to JAX."""


def map_arrays(function: Callable[[np.ndarray], Any], part: Any) -> Any:
    """A part of a batch on the host with `function` of each of its arrays."""
    if part is None or isinstance(part, np.ndarray):
        return part if part is None else function(part)
    if isinstance(part, dict):
        return {name: map_arrays(function, value) for name, value in part.items()}
    return type(part)(**{held.name: map_arrays(function, getattr(part, held.name)) for held in fields(part)})


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PackedShape(_Frozen):
    """How training batches pack a role; batches of evaluation give each study a row of its own."""

    studies: int
    """Of a row."""
    tokens: int
    """Of a row."""


class ImageShape(_Frozen):
    size: tuple[int, int, int]
    patch: tuple[int, int, int]
    channels: int
    """Of the model's voxels: those of the store, each once for every window."""
    window: Window | tuple[Window, ...] | None
    """Raw values that map to 0 and 1, or several such pairs; None where each volume has its own."""
    windows: tuple[Window | tuple[Window, ...], ...] = ()
    """That of each store of a mix, where they differ; of as many pairs."""
    normalise: tuple[float, float] | ZScore | None = None
    """How a volume gets a window of its own: by two percentiles, or by z-score."""
    pack: PackedShape | None = None
    spacing_mm: tuple[float, float, float] | None = None
    """That of the voxels of `size`, to which raw ones are resampled; None leaves them as they are."""
    read: tuple[int, int, int] | None = None
    """Voxels z y x of a raw batch where they are resampled: enough of the finest training image."""

    @property
    def raw(self) -> tuple[int, int, int]:
        """Voxels z y x of a raw batch."""
        return self.read or self.size

    @property
    def raw_channels(self) -> int:
        """Of a raw batch."""
        return self.channels // (1 if self.window is None else len(as_channels(self.window)))

    @property
    def raw_voxels_of_patch(self) -> int:
        """Of all channels of a raw batch."""
        return math.prod(self.patch) * self.raw_channels

    def low(self, limits: Any) -> float:
        """The raw value that is 0 in every window. `limits`: those of the volume, if it has its own."""
        return float(limits[0]) if self.window is None else min(low for low, _ in as_channels(self.window))

    def displayed(self, voxels: Shaped[np.ndarray, "*axes"], limits: Any) -> Float[np.ndarray, "*axes"]:
        """Raw voxels of a volume in [0, 1], in the first window. `limits`: those of the volume, if it has its own."""
        low, high = map(float, limits) if self.window is None else as_channels(self.window)[0]
        return np.clip((np.asarray(voxels, np.float32) - low) / (high - low), 0, 1)

    def of_source(self, source: int | None) -> ImageShape:
        """With the window of one store of a mix."""
        return self.model_copy(update={"window": self.windows[source]}) if self.windows and source is not None else self

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
    """Tokens of a text of each field."""
    readings: dict[str, int] = {}
    """How many texts of a field are shown side by side, where it is more than one."""
    excerpts: tuple[str, ...] = ()
    """Fields of which training also draws an excerpt."""
    vocabulary_size: int
    """Of the tokenizer."""
    mask_token: int
    """Token id that stands for a hidden token."""
    numbers: dict[str, NumberStats]
    categories: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[str, ...]]
    label_texts: dict[str, str] = {}
    """By label, the text that it was read out of, if any."""

    @property
    def text_tokens(self) -> dict[str, int]:
        """Of all texts of a field that are shown side by side."""
        return {field: length * self.readings.get(field, 1) for field, length in self.texts.items()}

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of image, text, table that the inputs hold."""
        held = {"image": self.images, "text": self.texts, "table": self.numbers or self.categories}
        return tuple(name for name, parts in held.items() if parts)
