"""Readers of images: what kind a file is, told by its first bytes, and one `read` for all kinds.

Nothing here trusts a file: sizes are checked against a limit before anything is decoded, headers that point to other
files are not followed out of their folder, archives are not opened, and a refusal never quotes what is in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmfm_jax.data.geometry import Volume
from mmfm_jax.data.refuse import Refused

DICOM, NIFTI, ITK, PNG, JPEG, TIFF = "dicom", "nifti", "itk", "png", "jpeg", "tiff"

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": PNG,
    b"\xff\xd8\xff": JPEG,
    b"II*\0": TIFF,
    b"MM\0*": TIFF,
    b"II+\0": TIFF,
    b"NRRD": ITK,
}
_ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_NIFTI_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh", ".hdr", ".hdr.gz")
_VOXELS_OF_ANOTHER = (".img", ".img.gz", ".raw", ".zraw", ".raw.gz")


def kind_of(path: Path) -> str:
    """One of the kinds above. Raises Refused for archives, empty files and what no reader knows."""
    name = path.name.lower()
    with path.open("rb") as file:
        head = file.read(400)
    if not head:
        raise Refused("empty", "it is an empty file")
    if head[128:132] == b"DICM":
        return DICOM
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if name.endswith(_NIFTI_SUFFIXES):
        return NIFTI
    if name.endswith((".mha", ".mhd")):
        return ITK
    if head.startswith(_ARCHIVES) or head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar":
        raise Refused("archive", "it is an archive or a compressed file")
    if name.endswith(_VOXELS_OF_ANOTHER):
        raise Refused("unknown_format", "it holds voxels without a header")
    if name.endswith((".dcm", ".ima", ".dicom")) or _like_dicom(head):
        return DICOM
    raise Refused("unknown_format", "it is of no format that is read")


def _like_dicom(head: bytes) -> bool:
    """Whether a file without preamble starts with a DICOM element of group 2 or 8, in either byte order."""
    return head[:4] in {
        b"\x02\0\0\0",
        b"\x02\0\x01\0",
        b"\x08\0\x05\0",
        b"\x08\0\x08\0",
        b"\0\x08\0\x05",
        b"\0\x08\0\x08",
    } or (head[:2] == b"\x08\0" and head[3] == 0)


def read_volume(
    kind: str, paths: Sequence[Path], voxel_limit: int, frames_as_channels: bool = False, slice_mm: float = 0.0
) -> Volume:
    """The volume in a file, or in the files of one DICOM series. Raises Refused, or UserError for a missing package.

    `voxel_limit`: most voxels that headers may announce; the rest is `dicom_series.read_series`'s.
    """
    if kind == DICOM:
        from mmfm_jax.data.readers.dicom_series import read_series

        return read_series(paths, voxel_limit, frames_as_channels, slice_mm)
    (path,) = paths
    if kind == NIFTI:
        from mmfm_jax.data.readers.nifti import read_nifti

        return read_nifti(path, voxel_limit)
    if kind == ITK:
        from mmfm_jax.data.readers.itk import read_itk

        return read_itk(path, voxel_limit)
    from mmfm_jax.data.readers.raster import read_raster

    return read_raster(path, kind, voxel_limit)
