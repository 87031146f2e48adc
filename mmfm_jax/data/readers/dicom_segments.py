"""DICOM segmentations (SEG) and structure sets (RTSTRUCT) as class numbers on the voxels of the series they are of.

A segmentation (PS3.3 C.8.20) is drawn frame by frame, so memory holds the mask and one frame however many segments
there are. Contours (C.8.8.6) are filled by the even-odd rule: a contour within another of its structure is a hole, and
a voxel belongs to a structure when its centre does. Nothing is drawn between contoured slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfm_jax.data.geometry import LPS_TO_RAS, OFF_GRID, Volume
from mmfm_jax.data.readers.dicom import RTSTRUCT, load
from mmfm_jax.data.readers.dicom_series import Plane, group_of, plane_of
from mmfm_jax.data.refuse import Refused

if TYPE_CHECKING:
    import pydicom

    from mmfm_jax.data.readers.legend import Legend

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def read_segments(path: Path, image: Volume, legend: Legend) -> np.ndarray:
    """Class numbers, uint8 [k, j, i] on the voxels of `image`. Raises Refused."""
    pydicom = load()
    try:
        ds = pydicom.dcmread(path, force=True)
        drawing = _Drawing(image)
        (_structures if ds.get("Modality") == RTSTRUCT else _frames)(ds, drawing, legend)
        return drawing.classes
    except (Refused, MemoryError):
        raise
    except Exception as error:  # as with images, what damaged files raise is open-ended and quotes them
        raise Refused("damaged", f"its segments cannot be read ({type(error).__name__})") from None


class _Drawing:
    """Class numbers on an image's voxels, to which segments are added a slice at a time."""

    def __init__(self, image: Volume):
        if image.affine is None:
            raise Refused("off_grid", "its image does not say where its pixels are")
        slices, rows, columns = image.voxels.shape[:3]
        self.classes = np.zeros((slices, rows, columns), np.uint8)
        self.plane = (rows, columns)
        self._from_lps = np.linalg.inv(image.affine) @ LPS_TO_RAS

    def indices(self, lps_mm: np.ndarray) -> np.ndarray:
        """i, j, k of points [n, 3] in LPS mm."""
        return lps_mm @ self._from_lps[:3, :3].T + self._from_lps[:3, 3]

    def slice_of(self, k: np.ndarray) -> int:
        """The slice that indices lie on. Raises Refused."""
        whole = int(np.rint(k.mean()))
        if not np.abs(k - whole).max() <= OFF_GRID or not 0 <= whole < len(self.classes):
            raise Refused("off_grid", "part of it does not lie on a slice of its image")
        return whole

    def add(self, k: int, inside: np.ndarray, number: int) -> None:
        """Raises Refused where another class is drawn already."""
        here = self.classes[k]
        if (inside & (here != 0) & (here != number)).any():
            raise Refused("overlapping_segments", "two of its segments overlap")
        here[inside] = number


# ---------------------------------------------------------------- SEG


def _frames(ds: pydicom.Dataset, drawing: _Drawing, legend: Legend) -> None:
    kind = str(ds.get("SegmentationType", "")).upper()
    if kind not in ("BINARY", "LABELMAP"):
        raise Refused("unsupported", "it holds fractions or does not say that its segments are binary")
    if (int(ds.Rows), int(ds.Columns)) != drawing.plane:
        raise Refused("off_grid", "its frames have other rows or columns than its image")
    segments = [one for one in ds.SegmentSequence if int(one.SegmentNumber) or kind == "BINARY"]  # 0 of a label map
    numbers = legend.of_names([str(one.get("SegmentLabel", "")).strip() for one in segments])
    class_of = {int(one.SegmentNumber): number for one, number in zip(segments, numbers)}
    for frame in range(int(ds.NumberOfFrames)):
        plane = plane_of(ds, frame)
        if plane is None:
            raise Refused("no_position", "one of its frames does not say where it is")
        k = _slice_of_plane(plane, drawing)
        if kind == "LABELMAP":
            pixels = _pixels(ds, frame)
            for value in np.unique(pixels[pixels != 0]).tolist():
                if number := class_of[value]:
                    drawing.add(k, pixels == value, number)
            continue
        held = group_of(ds, frame, "SegmentIdentificationSequence")
        if held is None:
            raise Refused("damaged", "one of its frames does not say of which segment it is")
        if number := class_of[int(held.ReferencedSegmentNumber)]:
            drawing.add(k, _pixels(ds, frame) != 0, number)


def _pixels(ds: pydicom.Dataset, frame: int) -> np.ndarray:
    """One frame [row, column]. Packed bits of a frame need not begin with a byte, which pydicom 3 takes them to do."""
    from pydicom.pixels.utils import pixel_array

    if int(ds.BitsAllocated) > 1 or ds.file_meta.TransferSyntaxUID.is_compressed:
        return pixel_array(ds, index=frame, raw=True)
    size = int(ds.Rows) * int(ds.Columns)
    first, last = frame * size, (frame + 1) * size
    held = np.frombuffer(ds.PixelData[first // 8 : (last + 7) // 8], np.uint8)
    return np.unpackbits(held, bitorder="little")[first % 8 :][:size].reshape(int(ds.Rows), int(ds.Columns))


def _slice_of_plane(plane: Plane, drawing: _Drawing) -> int:
    """The slice of the image that a frame of equal rows and columns covers. Raises Refused."""
    rows, columns = drawing.plane
    corners = np.array([[0, 0], [columns - 1, 0], [0, rows - 1]], float)  # i, j
    steps = np.stack([plane.along_row * plane.spacing_mm[1], plane.along_column * plane.spacing_mm[0]])
    found = drawing.indices(plane.position + corners @ steps)
    if np.abs(found[:, :2] - corners).max() > OFF_GRID:
        raise Refused("off_grid", "its frames do not cover the slices of its image")
    return drawing.slice_of(found[:, 2])


# ---------------------------------------------------------------- RTSTRUCT


def _structures(ds: pydicom.Dataset, drawing: _Drawing, legend: Legend) -> None:
    held = list(ds.StructureSetROISequence)
    numbers = legend.of_names([str(one.get("ROIName", "")).strip() for one in held])
    class_of = {int(one.ROINumber): number for one, number in zip(held, numbers)}
    for structure in ds.get("ROIContourSequence") or ():
        number = class_of[int(structure.ReferencedROINumber)]
        if not number:
            continue
        by_slice: dict[int, list[np.ndarray]] = {}
        for contour in structure.get("ContourSequence") or ():
            if contour.ContourGeometricType not in _CLOSED:
                raise Refused("unsupported", "one of its contours is not a closed line in a plane")
            points = drawing.indices(np.array(contour.ContourData, np.float64).reshape(-1, 3))
            by_slice.setdefault(drawing.slice_of(points[:, 2]), []).append(points[:, :2])
        for k, contours in by_slice.items():
            drawing.add(k, even_odd(contours, drawing.plane), number)


def even_odd(contours: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Pixels [y, x] whose centre is within an odd number of closed contours, each float [points, 2] as x y in pixels.

    A line at half the height of a pixel's centre crosses each edge that reaches below and not above it, so a vertex on
    the line counts once.
    """
    start = np.concatenate(contours)
    end = np.concatenate([np.roll(contour, -1, axis=0) for contour in contours])
    rows, columns = shape
    first, last = (np.ceil(f(start[:, 1], end[:, 1])).clip(0, rows).astype(int) for f in (np.minimum, np.maximum))
    crossed = last - first  # rows that each edge crosses
    edge = np.repeat(np.arange(len(start)), crossed)
    y = np.arange(len(edge)) - np.repeat(np.cumsum(crossed) - crossed, crossed) + first[edge]
    along = (y - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    x = start[edge, 0] + along * (end[edge, 0] - start[edge, 0])
    flips = np.zeros((rows, columns + 1), np.int32)
    np.add.at(flips, (y, np.ceil(x).clip(0, columns).astype(int)), 1)
    return np.cumsum(flips, axis=1)[:, :columns] % 2 == 1
