"""NIfTI-1 and NIfTI-2 (one file or a pair, gzipped or not) and FreeSurfer's MGH, through nibabel.

The affine is nibabel's: sform before qform. A file that sets neither does not say which side is left and is refused, as
is Analyze 7.5, whose convention differed between programs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmfm_jax.data.geometry import Volume
from mmfm_jax.data.readers.dicom import INSTALL
from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError

_UNIT_MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}


def load() -> Any:
    """The nibabel module. Raises UserError when it is not installed."""
    try:
        import nibabel
    except ImportError as error:
        raise UserError(f"nibabel, which reads NIfTI, is not installed; {INSTALL}") from error
    return nibabel


def read_nifti(path: Path, voxel_limit: int) -> Volume:
    """The image as [k, j, i, channel], its fourth axis (time, echo) as channels. Raises Refused."""
    nib = load()
    try:
        image = nib.load(path)
        return _volume(image, nib, voxel_limit)
    except (Refused, MemoryError):
        raise
    except Exception as error:
        raise Refused("damaged", f"it cannot be read as NIfTI or MGH ({type(error).__name__})") from None


def _volume(image: Any, nib: Any, voxel_limit: int) -> Volume:
    header = image.header
    if isinstance(image, (nib.Nifti1Image, nib.Nifti1Pair)):  # NIfTI-2 derives from these
        if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
            raise Refused("orientation_unknown", "neither its sform nor its qform is set")
        unit = _UNIT_MM[header.get_xyzt_units()[0]]
    elif isinstance(image, nib.MGHImage):
        if not int(header["goodRASFlag"]):
            raise Refused("orientation_unknown", "its direction cosines are not set")
        unit = 1.0
    else:
        raise Refused("unsupported", "it is of a format that does not state left and right, or is no volume")
    affine = image.affine.astype(np.float64)
    affine[:3] *= unit
    shape = image.shape
    if len(shape) < 2 or (len(shape) > 4 and max(shape[4:]) > 1):
        raise Refused("unsupported", f"it has {len(shape)} axes")
    voxels_in_file = int(np.prod([int(n) for n in shape]))
    if voxels_in_file > voxel_limit:
        raise Refused("too_large", f"its header announces {voxels_in_file:,} voxels")
    values = np.asanyarray(image.dataobj)  # scl_slope and scl_inter applied; whole numbers where there are none
    if values.dtype.names:  # RGB24, RGBA32
        if values.ndim > 3 and max(values.shape[3:]) > 1:
            raise Refused("unsupported", "it holds colour over time")
        values = values.reshape(_three(values.shape))
        values = np.stack([values[name] for name in values.dtype.names[:3]], -1)
    elif values.dtype.kind == "c":
        raise Refused("unsupported", "it holds complex numbers")
    else:
        values = values.reshape(*_three(shape), shape[3] if len(shape) > 3 else 1)
    return Volume(values.transpose(2, 1, 0, 3), affine)


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    i, j, k = (*shape, 1, 1)[:3]
    return i, j, k
