"""A DICOM series as one volume: slices in the order of their position along the normal, never of their names.

Geometry is that of PS3.3 C.7.6.2.1.1 (image plane); values are those of C.11.1 (modality LUT), so CT comes in HU.
Multi-frame objects, enhanced ones among them, take each frame's plane and rescale from its functional groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfm_jax.data.geometry import LPS_TO_RAS, Volume
from mmfm_jax.data.readers.dicom import PIXELS, load
from mmfm_jax.data.refuse import Refused

if TYPE_CHECKING:
    import pydicom

_EVEN = 0.05
"""Share of the slice distance by which it may vary: positions are often rounded to a tenth of a millimetre."""
_TILT_DEGREES = 0.5
_PHYSICAL = ("CT", "PT", "RTDOSE")
"""Modalities whose values are of a physical unit, which MONOCHROME1 does not turn round."""


@dataclass(frozen=True)
class Plane:
    """Where one slice is, in LPS mm."""

    position: np.ndarray
    along_row: np.ndarray
    along_column: np.ndarray
    spacing_mm: tuple[float, float]
    """Between rows, between columns."""
    thickness_mm: float


@dataclass(frozen=True)
class _Frame:
    values: np.ndarray
    """[row, column, channel]."""
    plane: Plane | None


def read_series(
    paths: Sequence[Path], voxel_limit: int, frames_as_channels: bool = False, slice_mm: float = 0.0
) -> Volume:
    """The volume [k, j, i, channel] that the files of one series make.

    `voxel_limit` bounds what the headers may announce, before anything is decoded. With `frames_as_channels` frames
    without a position become channels. `slice_mm` is the thickness of a single slice whose header gives none.
    Raises Refused for damaged files, disagreeing slices, missing, uneven or sheared ones.
    """
    pydicom = load()
    frames: list[_Frame] = []
    pixel_mm, announced = None, 0
    for path in paths:
        try:
            ds = pydicom.dcmread(path, force=True)
            announced += _announced(ds)
            if announced > voxel_limit:
                raise Refused("too_large", f"its headers announce more than {voxel_limit:,} voxels")
            frames.extend(_frames(ds))
            pixel_mm = pixel_mm or _pixel_mm(ds)
        except (Refused, MemoryError):
            raise
        except NotImplementedError:
            raise Refused("unsupported", "its pixels are of a kind that pydicom does not decode") from None
        except Exception as error:
            if isinstance(error, RuntimeError) and "decod" in str(error) and "plugin" in str(error):
                raise Refused("unsupported", "its transfer syntax has no decoder, or the decoder refused it") from None
            raise Refused("damaged", f"its pixels cannot be decoded ({type(error).__name__})") from None
    if len({frame.values.shape for frame in frames}) > 1:
        raise Refused("mixed_geometry", "its images differ in rows, columns or channels")
    planes = [frame.plane for frame in frames if frame.plane is not None]
    if len(planes) == len(frames):
        order, affine = stack(planes, slice_mm)
        return Volume(_joined([frames[i].values for i in order]), affine)
    if planes:
        raise Refused("mixed_geometry", "some of its images have a position and some have none")
    if len(frames) == 1:
        return Volume(frames[0].values[None], None, pixel_mm)
    if frames_as_channels and frames[0].values.shape[2] == 1:
        return Volume(np.concatenate([frame.values for frame in frames], -1)[None], None, pixel_mm)
    raise Refused("no_position", f"it has {len(frames)} frames and none says where it is")


def _announced(ds: pydicom.Dataset) -> int:
    frames = max(1, int(ds.get("NumberOfFrames") or 1))
    return int(ds.get("Rows") or 0) * int(ds.get("Columns") or 0) * frames * int(ds.get("SamplesPerPixel") or 1)


def _joined(slices: list[np.ndarray]) -> np.ndarray:
    """Slices in one array, emptying the list, so that both are not held at once."""
    out = np.empty((len(slices), *slices[0].shape), np.result_type(*{s.dtype for s in slices}))
    for k in range(len(slices)):
        out[k], slices[k] = slices[k], slices[k][:0]
    return out


# ---------------------------------------------------------------- geometry


def stack(planes: Sequence[Plane], slice_mm: float = 0.0) -> tuple[list[int], np.ndarray]:
    """The order of slices along their normal, and the affine from (column, row, slice) to RAS mm. Raises Refused."""
    first = planes[0]
    axes = np.stack([np.concatenate([p.along_row, p.along_column]) for p in planes])
    spacings = np.array([p.spacing_mm for p in planes])
    if np.abs(axes - axes[0]).max() > 1e-3 or np.abs(spacings / spacings[0] - 1).max() > 1e-3:
        raise Refused("mixed_geometry", "its slices differ in orientation or pixel spacing")
    normal = np.cross(first.along_row, first.along_column)
    positions = np.stack([p.position for p in planes])
    along = positions @ normal
    order = np.argsort(along, kind="stable").tolist()
    if len(planes) == 1:
        step = normal * (first.thickness_mm or slice_mm)
        if not (first.thickness_mm or slice_mm) > 0:
            raise Refused("spacing_unknown", "it is one slice and its header gives no thickness")
    else:
        _check_even(along[order])
        step = (positions[order[-1]] - positions[order[0]]) / (len(planes) - 1)
        tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
        if tilt > _TILT_DEGREES:
            raise Refused("gantry_tilt", f"its slices are sheared by {tilt:.1f} degrees")
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.spacing_mm[1]
    affine[:3, 1] = first.along_column * first.spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    return order, LPS_TO_RAS @ affine


def _check_even(along: np.ndarray) -> None:
    """`along`: positions on the normal in mm, ascending."""
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if usual <= 1e-4 or gaps.min() <= 0.01 * usual:
        raise Refused(
            "duplicate_slices", f"{int((gaps <= max(1e-4, 0.01 * usual)).sum())} of {len(along)} share a place"
        )
    tolerance = max(_EVEN * usual, 0.02)
    if np.abs(gaps - usual).max() <= tolerance:
        return
    whole = np.rint(gaps / usual)
    if np.abs(gaps - whole * usual).max() <= tolerance and whole.max() >= 2:
        raise Refused("missing_slices", f"{int(whole.sum()) - len(gaps)} are missing of {int(whole.sum()) + 1}")
    raise Refused("uneven_slices", f"its slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart")


def _pixel_mm(ds: pydicom.Dataset) -> tuple[float, float, float] | None:
    """Pixel spacing of an image without a position; at the detector where the patient's is not given."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        value = ds.get(keyword)
        if value and len(value) == 2 and min(value) > 0:
            thickness = float(ds.get("SpacingBetweenSlices") or ds.get("SliceThickness") or 0)
            return (thickness if thickness > 0 else 1.0, float(value[0]), float(value[1]))
    return None


def group_of(ds: pydicom.Dataset, frame: int, keyword: str) -> pydicom.Dataset | None:
    """A functional group's item for one frame: its own, else the shared one."""
    own, shared = ds.get("PerFrameFunctionalGroupsSequence"), ds.get("SharedFunctionalGroupsSequence")
    for source in (own[frame] if own and frame < len(own) else None, shared[0] if shared else None):
        if source is not None and source.get(keyword):
            return source.get(keyword)[0]
    return None


def plane_of(ds: pydicom.Dataset, frame: int) -> Plane | None:
    """Where a frame is; None when the header does not say. Raises Refused."""
    position = group_of(ds, frame, "PlanePositionSequence") or ds
    orientation = group_of(ds, frame, "PlaneOrientationSequence") or ds
    measures = group_of(ds, frame, "PixelMeasuresSequence") or ds
    origin, axes = position.get("ImagePositionPatient"), orientation.get("ImageOrientationPatient")
    spacing = measures.get("PixelSpacing")
    if not origin or not axes or not spacing:
        return None
    origin, axes = np.array(origin, np.float64), np.array(axes, np.float64)
    if origin.shape != (3,) or axes.shape != (6,) or len(spacing) != 2:
        raise Refused("damaged", "its position or orientation has the wrong number of values")
    along_row, along_column = axes[:3], axes[3:]
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    flat = np.abs(np.array(lengths) - 1).max() > 0.01 or abs(along_row @ along_column) > 0.01
    if flat or not min(spacing) > 0 or not (np.isfinite(origin).all() and np.isfinite(axes).all()):
        raise Refused("damaged", "its orientation is not that of a plane")
    along_row, along_column = along_row / lengths[0], along_column / lengths[1]
    if offsets := ds.get("GridFrameOffsetVector"):  # RT dose, C.8.8.3: planes above the first, along the normal
        if len(offsets) <= frame:
            raise Refused("damaged", "it has fewer frame offsets than frames")
        origin = origin + np.cross(along_row, along_column) * float(offsets[frame])
    elif measures is ds and position is ds and int(ds.get("NumberOfFrames") or 1) > 1:
        return None  # one position for several frames says nothing of the others
    thickness = abs(float(measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 0))
    return Plane(origin, along_row, along_column, (float(spacing[0]), float(spacing[1])), thickness)


# ---------------------------------------------------------------- values


def _frames(ds: pydicom.Dataset) -> Iterator[_Frame]:
    from pydicom.pixels.utils import pixel_array

    if not any(keyword in ds for keyword in PIXELS):
        raise Refused("no_image", "it is a DICOM object without pixels")
    if "file_meta" not in ds.__dict__ or "TransferSyntaxUID" not in ds.file_meta:
        raise Refused("damaged", "it does not state its transfer syntax")
    if str(ds.get("Modality", "")) == "SEG":
        raise Refused("unsupported", "it is a segmentation, not an image")
    for frame in range(max(1, int(ds.get("NumberOfFrames") or 1))):
        yield _Frame(_values(ds, frame, pixel_array(ds, index=frame)), plane_of(ds, frame))


def _values(ds: pydicom.Dataset, frame: int, raw: np.ndarray) -> np.ndarray:
    """[row, column, channel] in the unit that the header defines."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

    photometric = str(ds.get("PhotometricInterpretation", ""))
    if photometric == "PALETTE COLOR":
        return apply_color_lut(raw, ds)[..., :3]
    if raw.ndim == 3:
        return raw
    if photometric == "MONOCHROME1" and str(ds.get("Modality", "")) not in _PHYSICAL and raw.dtype.kind in "iu":
        bits = int(ds.get("BitsStored") or 8 * raw.itemsize)
        highest = (1 << bits) - 1
        raw = (-1 - raw) if raw.dtype.kind == "i" else (highest - raw)
    transform = group_of(ds, frame, "PixelValueTransformationSequence") or ds
    if ds.get("ModalityLUTSequence"):
        return apply_modality_lut(raw, ds)[..., None]
    slope = float(transform.get("RescaleSlope", 1) if transform.get("RescaleSlope") is not None else 1)
    intercept = float(transform.get("RescaleIntercept") or 0)
    if scaling := ds.get("DoseGridScaling"):
        slope = float(scaling)
    if slope == 1 and intercept == 0:
        return raw[..., None]
    if slope.is_integer() and intercept.is_integer() and raw.dtype.kind in "iu":
        wide = np.int32 if raw.itemsize < 4 and abs(slope) < 2**14 and abs(intercept) < 2**30 else np.int64
        return (raw.astype(wide) * int(slope) + int(intercept))[..., None]
    return (raw * slope + intercept).astype(np.float32)[..., None]
