"""`inputs`: the contract between the data and the model."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmfm_jax.config.base import LARGEST, LOW_HIGH, ZYX, Config, Extent, Fraction, PositiveFloat, PositiveInt

Window = Annotated[tuple[float, float], LOW_HIGH]
Percent = Annotated[float, Field(ge=0, le=100)]
ZScore = Literal["zscore", "zscore_foreground"]


def as_channels(window: Any) -> tuple[Window, ...]:
    """One window, or several, as several."""
    return window if isinstance(window[0], tuple) else (window,)


def check_windows(window: Window | tuple[Window, ...]) -> None:
    """Raises ValueError when one of the windows is empty, or there is none."""
    if not window:
        raise ValueError("window is an empty list; give [low, high], or several such pairs")
    for low, high in as_channels(window):
        if not low < high:
            raise ValueError(f"window {[low, high]} is empty; give [low, high] with low < high")


class Percentiles(Config):
    """The window of each volume by its own intensities."""

    percentiles: Annotated[tuple[Percent, Percent], LOW_HIGH] = (0.5, 99.5)
    """Of the whole volume, which map to 0 and 1; values outside are clipped."""

    @model_validator(mode="after")
    def _in_order(self):
        if not self.percentiles[0] < self.percentiles[1]:
            raise ValueError(f"percentiles {list(self.percentiles)} are not in order; give [low, high] with low < high")
        return self


class Packing(Config):
    """Images of several studies side by side in one row of tokens (NaViT, arXiv:2307.06304), each as large as it is."""

    studies: PositiveInt
    """Studies that share a row, the same number for every packed role; divides the batch of a device."""
    tokens: PositiveInt
    """Patches of a row; where its studies have more, the largest lose patches at their borders."""
    trim: bool = False
    """Leaves out border patches that hold nothing above the low end of its window, such as air around a body."""

    @model_validator(mode="after")
    def _one_each(self):
        if self.tokens < self.studies:
            raise ValueError(
                f"{self.tokens} tokens leave no patch for some of {self.studies} studies; give more tokens"
            )
        return self


class Foreground(Config):
    """A share of the random crops centred on a voxel of the foreground, as nnU-Net does."""

    share: Fraction = 0.33
    """Of the training crops; the others are anywhere in the volume."""
    mask: str | None = None
    """Mask of the role whose classes are the foreground: of those that a study holds one is drawn, then a voxel of it.
    Without a mask, foreground is what is brighter than `above`."""
    above: float | None = None
    """Raw value; by default the one that parts the training images of the store best in two (Otsu's)."""

    @model_validator(mode="after")
    def _one_kind(self):
        if self.mask is not None and self.above is not None:
            raise ValueError("`mask` and `above` are two ways to say what foreground is; leave one of them out")
        return self


class ImageInput(Config):
    """How one image role enters the model."""

    size: Extent
    """Voxels of the crop, z y x; a 2D image is one slice (1, y, x). The largest crop where images are packed."""
    patch: Extent
    """Voxels of one token, z y x; divides `size`."""
    window: Window | tuple[Window, ...] | None = None
    """Raw values (HU, grey levels) that map to 0 and 1; values outside are clipped. Several, such as those of lung,
    soft tissue and bone, each become a channel of their own."""
    normalise: Percentiles | ZScore | None = None
    """In place of `window`, for images without a unit, such as MRI: each volume by its own intensities, those of the
    whole volume and not of the crop. `zscore` maps 4 standard deviations below and above the mean to 0 and 1;
    `zscore_foreground` takes mean and deviation of what is above the volume's smallest value, for images whose air was
    set to one value, such as brains without the skull."""
    crop: Literal["centre", "random"] = "centre"
    """Where training crops of volumes larger than `size` are taken; evaluation always takes the centre."""
    spacing_mm: Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], ZYX] | None = None
    """Spacing of the voxels of `size`, z y x: crops of a store of native spacings are read as large as they need be and
    resampled on the device. Without it a crop is `size` voxels as the store holds them."""
    foreground: Foreground | None = None
    """Centres a share of the random crops on the foreground or on classes of a mask."""
    pack: Packing | None = None
    """Gives each image only the tokens that it fills, and lets several studies share a row of them."""

    @property
    def windows(self) -> tuple[Window, ...]:
        """Those that are fixed, each a channel; none where each volume has its own."""
        return () if self.window is None else as_channels(self.window)

    @property
    def own_window(self) -> tuple[float, float] | ZScore | None:
        """How each volume gets a window of its own: by two percentiles or by z-score; None where `window` is given."""
        return self.normalise.percentiles if isinstance(self.normalise, Percentiles) else self.normalise

    @model_validator(mode="after")
    def _divides(self):
        if math.prod(self.size) > LARGEST:
            raise ValueError(f"size {list(self.size)} is {math.prod(self.size)} voxels; give {LARGEST} at most")
        if any(s % p for s, p in zip(self.size, self.patch)):
            raise ValueError(
                f"patch {list(self.patch)} does not divide size {list(self.size)}; make each size a multiple"
            )
        if (self.window is None) == (self.normalise is None):
            raise ValueError(
                "an image has either a window, such as [-1000, 400], or normalise, such as zscore; give one of the two"
            )
        if self.window is not None:
            check_windows(self.window)
        if self.pack and self.pack.trim and isinstance(self.normalise, str):
            raise ValueError(
                "pack.trim leaves out what is at the low end of the window, and that of a z-score is below air; "
                "set trim: false, or normalise by percentiles"
            )
        if self.spacing_mm and self.pack:
            raise ValueError(
                "spacing_mm resamples voxels across patches, which packed images cannot do; drop one of them"
            )
        if self.foreground and self.crop != "random":
            raise ValueError("foreground is of random crops; set crop: random")
        return self


class TextInput(Config):
    """How one text field enters the model."""

    length: PositiveInt
    """Tokens kept of a text; shorter ones are padded."""
    readings: PositiveInt = 1
    """Texts of a study that are shown at once, where it has several, such as the reports of several readers or days.
    Training draws how many and which of them, evaluation shows as many at a time until all were shown."""
    sentence_keep: Fraction = 1.0
    """Training only: chance that a sentence of the text is shown, in random order (ConVIRT, arXiv:2010.00747);
    1 shows the text as it stands."""
    excerpt: Fraction | None = None
    """Training only: contrasts read one text of a study, each of its sentences with this chance, in random order, while
    other tasks read what `readings` and `sentence_keep` give. null: contrasts read the first of those texts."""


class Inputs(Config):
    """Which parts of a study the model sees."""

    images: dict[str, ImageInput] = {}
    """Image roles by their name in the store."""
    texts: dict[str, TextInput] = {}
    """Text fields by their name in the store."""
    columns: tuple[str, ...] = ()
    """Table columns by their name in the store."""

    @model_validator(mode="after")
    def _some(self):
        if not (self.images or self.texts or self.columns):
            raise ValueError("no image, text or column is named; name at least one")
        packed = {image.pack.studies for image in self.images.values() if image.pack}
        if len(packed) > 1:
            counts = " and ".join(map(str, sorted(packed)))
            raise ValueError(f"images are packed {counts} studies a row; give every packed role the same pack.studies")
        return self

    @property
    def studies_a_row(self) -> int:
        """Consecutive studies of a batch that cannot be parted, because their images share a row."""
        return max((image.pack.studies for image in self.images.values() if image.pack), default=1)
