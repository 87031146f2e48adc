"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr), through SimpleITK.

Both may keep their voxels in another file, which the header names. Only a plain name beside the header is followed:
a header is input, and must not make ingest read what lies elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from mmfm_jax.data.geometry import LPS_TO_RAS, Volume
from mmfm_jax.data.readers.dicom import INSTALL
from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError

_HEADER_BYTES = 65_536
_LOCAL = {"local", ""}


def load() -> Any:
    """The SimpleITK module. Raises UserError when it is not installed."""
    try:
        import SimpleITK
    except ImportError as error:
        raise UserError(f"SimpleITK, which reads MetaImage and NRRD, is not installed; {INSTALL}") from error
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def read_itk(path: Path, voxel_limit: int) -> Volume:
    """The image as [k, j, i, channel]; a vector image or a fourth axis gives channels. Raises Refused."""
    sitk = load()
    named = data_files(path)
    for name in named:
        if name != Path(name).name or name in {"..", "."} or "\\" in name:
            raise Refused("outside_root", "its header names voxels in another folder")
        if not (path.parent / name).is_file() or (path.parent / name).is_symlink():
            raise Refused("damaged", "the file of voxels that its header names is not beside it")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() in {".nrrd", ".nhdr"} else "MetaImageIO")
    try:
        reader.ReadImageInformation()
        size, channels = reader.GetSize(), reader.GetNumberOfComponents()
        if int(np.prod([int(n) for n in size])) * channels > voxel_limit:
            raise Refused("too_large", f"its header announces {'x'.join(map(str, size))} voxels")
        image = reader.Execute()
    except RuntimeError:  # ITK's messages quote the path
        raise Refused("damaged", "ITK cannot read it") from None
    dimension = image.GetDimension()
    if dimension not in (2, 3, 4):
        raise Refused("unsupported", f"it has {dimension} axes")
    values = sitk.GetArrayFromImage(image)
    if values.dtype.kind == "c":
        raise Refused("unsupported", "it holds complex numbers")
    if channels == 1:
        values = values[..., None]
    spacing, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
    direction = np.array(image.GetDirection()).reshape(dimension, dimension)
    if dimension == 2:
        return Volume(values[None], None, (1.0, float(spacing[1]), float(spacing[0])))
    if dimension == 4:
        if channels > 1:
            raise Refused("unsupported", "it holds colour over time")
        values = np.moveaxis(values[..., 0], 0, -1)
    affine = np.eye(4)
    affine[:3, :3] = direction[:3, :3] * spacing[:3]
    affine[:3, 3] = origin[:3]
    return Volume(values, LPS_TO_RAS @ affine)


def data_files(path: Path) -> list[str]:
    """Names of other files that a header says hold the voxels; none when they follow the header. Raises Refused."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    text = head.decode("latin-1")
    if path.suffix.lower() in {".nrrd", ".nhdr"}:
        text = re.split(r"\r?\n\r?\n", text, maxsplit=1)[0]
        found = re.search(r"(?im)^data\s*file\s*:\s*(.*?)\s*$", text)
    else:
        found = re.search(r"(?im)^ElementDataFile\s*=\s*(.*?)\s*$", text)
        if found is None:
            raise Refused("damaged", "its header does not say where the voxels are")
    name = found.group(1).strip() if found else ""
    if name.lower() in _LOCAL:
        return []
    if name.upper().startswith("LIST") or "%" in name or " " in name.strip():
        raise Refused("unsupported", "its voxels are spread over several files")
    return [name]
