"""Segmentations as class numbers on the voxels of their image: from volumes, DICOM SEG and DICOM RTSTRUCT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfm_jax.data.geometry import Volume, onto
from mmfm_jax.data.readers import DICOM, read_volume
from mmfm_jax.data.readers.legend import Legend
from mmfm_jax.data.refuse import Refused


@dataclass(frozen=True)
class MaskSource:
    """A file of a mask."""

    kind: str
    path: Path
    segment: str = ""
    """The one segment that it holds, by a name for the legend; empty when the file itself says which it holds."""


def read_mask(files: Sequence[MaskSource], image: Volume, legend: Legend, voxel_limit: int) -> np.ndarray:
    """Class numbers, uint8 [k, j, i] on the voxels of `image`, of one file or of a file for each segment.

    0 is background. Raises Refused when a file is damaged, of another grid, or of classes that are not declared or
    overlap.
    """
    if not files[0].segment:
        return _read(files[0].kind, files[0].path, image, legend, voxel_limit)
    out = np.zeros(image.voxels.shape[:3], np.uint8)
    for file, number in zip(files, legend.of_names([file.segment for file in files])):
        if number:
            try:
                inside = _inside(file, image, voxel_limit)
                if ((out[inside] != 0) & (out[inside] != number)).any():
                    raise Refused("overlapping_segments", "it overlaps another")
            except Refused as why:
                raise Refused(why.reason, f"its file of {legend.classes[number - 1]}: {why.detail}") from None
            out[inside] = number
    return out


def _inside(file: MaskSource, image: Volume, voxel_limit: int) -> np.ndarray:
    """Where a file of one segment is not 0, bool [k, j, i]. Raises Refused when it holds several numbers."""
    volume = read_volume(file.kind, [file.path], voxel_limit)
    inside = volume.voxels != 0
    if volume.voxels.shape[3] != 1 or not (volume.voxels[inside] == volume.voxels.max()).all():
        raise Refused("not_a_mask", "it holds more than one number beside 0")
    return onto(Volume(inside, volume.affine), image)


def _read(kind: str, path: Path, image: Volume, legend: Legend, voxel_limit: int) -> np.ndarray:
    if kind == DICOM:
        from mmfm_jax.data.readers.dicom_segments import read_segments  # pydicom takes a moment to import

        return read_segments(path, image, legend)
    volume = read_volume(kind, [path], voxel_limit)
    if volume.voxels.shape[3] != 1:
        raise Refused("not_a_mask", f"it has {volume.voxels.shape[3]} channels")
    return legend.of_voxels(onto(volume, image))
