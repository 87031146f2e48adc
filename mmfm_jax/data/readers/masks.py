"""Segmentations as class numbers on the voxels of their image: from volumes, DICOM SEG and DICOM RTSTRUCT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfm_jax.data.geometry import Volume, onto
from mmfm_jax.data.readers import DICOM, read_volume
from mmfm_jax.data.refuse import Refused

_MOST_VALUES = 2**24


@dataclass(frozen=True)
class Legend:
    """What the names and numbers of a source mean."""

    classes: tuple[str, ...]
    values: Mapping[str, str]
    """Class by the name or number of a segment; a class's own name needs no entry, nor do 1, 2, ... without any number
    here."""
    others: bool
    """Whether segments of no class are background; else they are refused."""

    def of_names(self, names: Sequence[str]) -> list[int]:
        """The number of each segment's class, 1 + index, or 0 for background. Raises Refused."""
        meant = [self.values.get(name, name) for name in names]
        return self._known([self.classes.index(name) + 1 if name in self.classes else 0 for name in meant], "segments")

    def of_voxels(self, voxels: np.ndarray) -> np.ndarray:
        """Class numbers, uint8, of whole numbers [k, j, i], of which 0 is background. Raises Refused."""
        low, high = float(voxels.min()), float(voxels.max())
        if not high - low < _MOST_VALUES:
            raise Refused("not_a_mask", "its numbers are not finite, or too far apart to stand for classes")
        first = round(low)
        seen = np.zeros(round(high) - first + 1, bool)
        for plane in voxels:
            whole = np.rint(plane)
            if np.abs(plane - whole).max() > 1e-3:
                raise Refused("not_a_mask", "it holds numbers that are not whole")
            seen[whole.astype(np.int64) - first] = True
        values = [value for value in (np.flatnonzero(seen) + first).tolist() if value]
        table = np.zeros(len(seen), np.uint8)
        table[np.array(values, int) - first] = self._known([self._of_value(value) for value in values], "values")
        return np.stack([table[np.rint(plane).astype(np.int64) - first] for plane in voxels])

    def _of_value(self, value: int) -> int:
        if any(spelling.isdigit() for spelling in self.values):
            name = self.values.get(str(value))
            return self.classes.index(name) + 1 if name else 0
        return value if 0 < value <= len(self.classes) else 0

    def _known(self, numbers: list[int], what: str) -> list[int]:
        if not self.others and (unknown := numbers.count(0)):
            raise Refused("unknown_class", f"{unknown} of its {len(numbers)} {what} are of no declared class")
        return numbers


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
        from mmfm_jax.data.readers.dicom_segments import read_segments

        return read_segments(path, image, legend)
    volume = read_volume(kind, [path], voxel_limit)
    if volume.voxels.shape[3] != 1:
        raise Refused("not_a_mask", f"it has {volume.voxels.shape[3]} channels")
    return legend.of_voxels(onto(volume, image))
