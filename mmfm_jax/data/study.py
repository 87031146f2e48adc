"""What one patient encounter holds, and what a store declares that it may hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from mmfm_jax.errors import UserError

PartName = Annotated[str, Field(min_length=1, max_length=200)]
FolderName = Annotated[str, Field(pattern=r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,199}$")]
"""Of what has a folder of the store: a name that is a path neither within it nor out of it."""
MOST_VOXELS = 2**33
"""Of a volume, all channels together."""


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageSpec(_Declared):
    """An image role. Axes are z y x, then channels; orientation is RAS."""

    dtype: Annotated[str, Field(pattern="^(bool|u?int(8|16|32|64)|float(16|32|64))$")]
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None
    """Voxels z y x when all volumes of the role share one shape (they are stacked in one array), else None."""
    channels: Annotated[int, Field(ge=1, le=2**16)] = 1
    description: str = ""

    @model_validator(mode="after")
    def _fits_memory(self):
        if prod(self.shape or (1,)) * self.channels > MOST_VOXELS:
            raise ValueError(f"shape: a volume has at most {MOST_VOXELS:,} voxels, all channels together")
        return self


class ColumnSpec(_Declared):
    """A table column: a number with a unit, or one of a fixed vocabulary."""

    kind: Literal["number", "category"]
    unit: str = ""
    vocabulary: tuple[str, ...] = ()
    description: str = ""


class LabelSpec(_Declared):
    """A class label; a study may lack it."""

    classes: tuple[str, ...]
    description: str = ""
    from_text: str = ""
    """The text field that the label was read out of, or that states it; empty: none. Who is shown that text is told the
    label."""


class MaskSpec(_Declared):
    """A segmentation of an image role: uint8 voxels on the image's own grid; 0 is background."""

    image: str
    classes: Annotated[tuple[str, ...], Field(min_length=1, max_length=255)]
    """Names of the values 1, 2, ... Structures that overlap are masks of their own."""
    description: str = ""


class Schema(_Declared):
    """Everything that studies of a store may hold; nothing else enters it."""

    images: dict[FolderName, ImageSpec] = {}
    texts: dict[PartName, str] = {}
    """Text fields with their descriptions."""
    columns: dict[PartName, ColumnSpec] = {}
    labels: dict[PartName, LabelSpec] = {}
    masks: dict[FolderName, MaskSpec] = {}

    @model_validator(mode="after")
    def _masks_have_images(self):
        for name, mask in self.masks.items():
            if mask.image not in self.images:
                raise ValueError(f"masks.{name}: there is no image role {mask.image}")
        return self

    def masks_of(self, role: str) -> dict[str, MaskSpec]:
        """Masks of an image role."""
        return {name: mask for name, mask in self.masks.items() if mask.image == role}


@dataclass(frozen=True)
class Image:
    """One volume of a study; a 2D image is one slice."""

    voxels: np.ndarray
    """[z, y, x, channels], raw dtype."""
    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along z y x."""


@dataclass(frozen=True)
class Study:
    """One patient encounter. Any part may be missing."""

    patient: str
    """Keyed hash of the patient: decides the split and groups the bootstrap, and cannot be turned back."""
    split: str
    images: dict[str, Image] = field(default_factory=dict)
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By field; several texts of one field are alternatives (one a reader), of which training draws one."""
    row: dict[str, float | str] = field(default_factory=dict)
    """Numbers in their column's unit, categories by name; a missing value has no key."""
    labels: dict[str, int] = field(default_factory=dict)
    """Index into the label's classes."""
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    """uint8 [z, y, x] on the grid of the mask's image, which must be there: 0, or 1 + index into the classes."""


def check_study(study: Study, schema: Schema, row: int) -> None:
    """Raises UserError unless the study holds only what the schema declares, in the declared form."""
    parts = {"images": study.images, "texts": study.texts, "columns": study.row, "labels": study.labels}
    parts["masks"] = study.masks
    for part, held in parts.items():
        unknown = set(held) - set(getattr(schema, part))
        if unknown:
            raise UserError(f"study {row}: {min(unknown)} is not among the {part} of the schema; declare it there")
    for role, image in study.images.items():
        spec, voxels = schema.images[role], image.voxels
        expected = (*(spec.shape or voxels.shape[:3]), spec.channels)
        if voxels.ndim != 4 or voxels.shape != expected or voxels.size == 0:
            raise UserError(f"study {row}: image {role} has shape {voxels.shape} and the schema says {expected}")
        if voxels.dtype != np.dtype(spec.dtype):
            raise UserError(f"study {row}: image {role} is {voxels.dtype} and the schema says {spec.dtype}")
        if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
            raise UserError(f"study {row}: image {role} has voxels that are no finite numbers; leave the image out")
        if not all(np.isfinite(s) and s > 0 for s in image.spacing_mm):
            raise UserError(f"study {row}: image {role} has spacing {image.spacing_mm}; give positive millimetres")
    for name, mask in study.masks.items():
        spec = schema.masks[name]
        if spec.image not in study.images:
            raise UserError(f"study {row}: mask {name} is of image {spec.image}, which is not there; leave it out")
        expected = study.images[spec.image].voxels.shape[:3]
        if mask.shape != expected or mask.dtype != np.uint8:
            raise UserError(
                f"study {row}: mask {name} is {mask.dtype} of shape {mask.shape}; make it uint8 of {expected}, as its "
                "image is"
            )
        if mask.max() > len(spec.classes):
            classes = len(spec.classes)
            raise UserError(f"study {row}: mask {name} holds the value {mask.max()} and has {classes} classes")
    for name, value in study.row.items():
        column = schema.columns[name]
        if column.kind == "category" and value not in column.vocabulary:
            raise UserError(f"study {row}: column {name} has a value outside its vocabulary {list(column.vocabulary)}")
        if column.kind == "number" and not (isinstance(value, (int, float)) and np.isfinite(value)):
            raise UserError(f"study {row}: column {name} is not a finite number; leave a missing value out of the row")
    for name, value in study.labels.items():
        if not 0 <= value < len(schema.labels[name].classes):
            raise UserError(
                f"study {row}: label {name} is {value}, outside its {len(schema.labels[name].classes)} classes"
            )
