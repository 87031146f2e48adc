"""What one patient encounter holds, and what a store declares that it may hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageSpec(_Declared):
    """An image role. Axes are z y x, then channels; orientation is RAS."""

    dtype: str
    shape: tuple[int, int, int] | None
    """Voxels z y x when all volumes of the role share one shape (they are stacked in one array), else None."""
    channels: int = 1
    description: str = ""


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


class Schema(_Declared):
    """Everything that studies of a store may hold; nothing else enters it."""

    images: dict[str, ImageSpec] = {}
    texts: dict[str, str] = {}
    """Text fields with their descriptions."""
    columns: dict[str, ColumnSpec] = {}
    labels: dict[str, LabelSpec] = {}


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
