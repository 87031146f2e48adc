"""A batch of studies as arrays, and the specification that says what the arrays mean: `parts.py`, known to JAX."""

from __future__ import annotations

from typing import TypeAlias

import jax
import numpy as np

from mmfm_jax.data.parts import (
    PAD,
    PARTS,
    Batch,
    ImagePart,
    ImageShape,
    InputSpec,
    LabelPart,
    NumberStats,
    PackedPart,
    PackedShape,
    TablePart,
    TextPart,
)

__all__ = [
    "PAD",
    "Array",
    "Batch",
    "ImagePart",
    "ImageShape",
    "InputSpec",
    "LabelPart",
    "NumberStats",
    "PackedPart",
    "PackedShape",
    "TablePart",
    "TextPart",
]

Array: TypeAlias = jax.Array | np.ndarray

for _part in PARTS:
    jax.tree_util.register_dataclass(_part)
