"""PNG, JPEG and TIFF, 8 and 16 bit: pixels alone, nothing of their EXIF, GPS or text chunks.

They do not say how far apart their pixels are in the patient (dots an inch is about paper), so the role must.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from mmfm_jax.data.geometry import Volume
from mmfm_jax.data.readers.dicom import INSTALL
from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError

_ORIENTATION = 274  # of EXIF
_ALPHA = {"RGBA", "LA", "PA"}


def load(name: str) -> Any:
    """The module that reads a format. Raises UserError when it is not installed."""
    try:
        if name == "tiff":
            import tifffile

            return tifffile
        import PIL.Image

        return PIL
    except ImportError as error:
        package = "tifffile" if name == "tiff" else "pillow"
        raise UserError(f"{package}, which reads {name.upper()}, is not installed; {INSTALL}") from error


def read_raster(path: Path, kind: str, voxel_limit: int) -> Volume:
    """The image as [k, row, column, channel] without a place; `kind` is png, jpeg or tiff. Raises Refused."""
    module = load(kind)
    try:
        pixels = _tiff(path, module, voxel_limit) if kind == "tiff" else _pillow(path, kind, voxel_limit)
    except (Refused, MemoryError, UserError):
        raise
    except Exception as error:
        raise Refused("damaged", f"it cannot be read as {kind.upper()} ({type(error).__name__})") from None
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * 255
    return Volume(pixels, None)


def _pillow(path: Path, kind: str, voxel_limit: int) -> np.ndarray:
    import PIL.Image
    import PIL.ImageOps

    PIL.Image.MAX_IMAGE_PIXELS = None  # the limit is ours, and checked before anything is decoded
    if kind == "png" and (pixels := _sixteen_bit_colour(path, voxel_limit)) is not None:
        return pixels[None]
    with PIL.Image.open(path, formats=[kind.upper()]) as image:
        if image.width * image.height * 4 > voxel_limit:
            raise Refused("too_large", f"its header announces {image.width} x {image.height} pixels")
        if getattr(image, "n_frames", 1) > 1:
            raise Refused("unsupported", "it is animated")
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
        has_alpha = image.mode in _ALPHA or "transparency" in image.info
        if has_alpha:
            grey = image.mode in {"L", "LA"}
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                raise Refused("unsupported", "it is transparent in places")
            image = image.convert("L" if grey else "RGB")
        elif image.mode in {"P", "CMYK", "YCbCr", "HSV", "LAB"}:
            image = image.convert("RGB")
        pixels = np.asarray(image)
    if pixels.dtype.kind == "i":  # mode I, which Pillow gives for 16 bits in some files
        pixels = pixels.astype(np.int32)
    return (pixels if pixels.ndim == 3 else pixels[..., None])[None]


def _sixteen_bit_colour(path: Path, voxel_limit: int) -> np.ndarray | None:
    """Pixels of a PNG of 16-bit colour, which Pillow would cut to 8; None for any other PNG."""
    with path.open("rb") as file:
        head = file.read(29)
    if len(head) < 29 or head[12:16] != b"IHDR":
        raise Refused("damaged", "it has no PNG header")
    width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
    if width * height * 4 > voxel_limit:
        raise Refused("too_large", f"its header announces {width} x {height} pixels")
    if bits != 16 or colour == 0:
        return None
    try:
        import imagecodecs
    except ImportError as error:
        raise UserError(f"imagecodecs, which reads 16-bit colour, is not installed; {INSTALL}") from error
    pixels = imagecodecs.png_decode(path.read_bytes())
    if colour & 4:  # with alpha
        if pixels[..., -1].min() < 65535:
            raise Refused("unsupported", "it is transparent in places")
        pixels = pixels[..., :-1]
    return pixels


def _tiff(path: Path, tifffile: Any, voxel_limit: int) -> np.ndarray:
    with tifffile.TiffFile(path) as file:
        if not file.series:
            raise Refused("empty", "it has no images")
        if len(file.series) > 1:
            raise Refused("mixed_geometry", "its pages differ in size or type")
        series = file.series[0]
        if int(np.prod([int(n) for n in series.shape])) > voxel_limit:
            raise Refused("too_large", f"its header announces {'x'.join(map(str, series.shape))} pixels")
        page = series.pages[0]
        axes = series.axes
        pixels = series.asarray()
        white_is_zero = int(getattr(page, "photometric", 1) or 0) == 0 and pixels.dtype.kind in "ub"
        palette = int(getattr(page, "photometric", 1) or 0) == 3
        extra = tuple(int(e) for e in getattr(page, "extrasamples", ()) or ())
    if palette:
        raise Refused("unsupported", "it is a palette image")
    if white_is_zero:
        pixels = ~pixels
    if axes.endswith("S"):
        if extra:
            highest = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
            if pixels.shape[-1] not in (2, 4) or pixels[..., -1].min() < highest:
                raise Refused("unsupported", "it is transparent in places or has extra samples")
            pixels = pixels[..., :-1]
        axes = axes[:-1]
    elif axes.startswith("S"):
        pixels, axes = np.moveaxis(pixels, 0, -1), axes[1:]
    else:
        pixels = pixels[..., None]
    if axes == "YX":
        return pixels[None]
    if len(axes) == 3 and axes[1:] == "YX" and axes[0] in "ZIQ":
        return pixels
    raise Refused("unsupported", f"it has the axes {''.join(c for c in axes if c.isalpha())}")
