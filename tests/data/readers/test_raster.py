"""PNG, JPEG and TIFF are read as Pillow, tifffile and imagecodecs wrote them, 8 and 16 bit, grey and colour."""

import struct
import zlib

import numpy as np
import pytest

from mmfm_jax.data.readers import kind_of, read_volume
from mmfm_jax.data.refuse import Refused

Image = pytest.importorskip("PIL.Image")
tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")

LIMIT = 10**8


def read(path, limit=LIMIT) -> np.ndarray:
    volume = read_volume(kind_of(path), [path], limit)
    assert volume.affine is None and volume.spacing_mm is None
    return volume.voxels


def refused(path, reason: str, limit=LIMIT) -> None:
    with pytest.raises(Refused) as raised:
        read(path, limit)
    assert raised.value.reason == reason, raised.value


@pytest.fixture
def pixels():
    rng = np.random.default_rng()
    return lambda dtype, *shape: rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_lossless(tmp_path, pixels, kind, dtype, channels):
    raw = pixels(dtype, 7, 5, channels)
    if channels == 4:
        raw[..., 3] = np.iinfo(dtype).max
    path = tmp_path / f"a.{kind}"
    squeezed = raw[..., 0] if channels == 1 else raw
    if kind == "png":
        path.write_bytes(imagecodecs.png_encode(squeezed))
    else:
        extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
        photometric = "minisblack" if channels == 1 else "rgb"
        tifffile.imwrite(path, squeezed, compression="lzw", photometric=photometric, **extra)
    np.testing.assert_array_equal(read(path), raw[None, ..., : min(channels, 3)])
    if channels == 4:
        raw[2, 3, 3] = 7
        path.write_bytes(imagecodecs.png_encode(raw)) if kind == "png" else tifffile.imwrite(
            path, raw, photometric="rgb", extrasamples=["unassalpha"]
        )
        refused(path, "unsupported")


def test_jpeg_palette_and_one_bit(tmp_path, pixels):
    Image.fromarray(pixels(np.uint8, 9, 8, 3)).save(tmp_path / "a.jpg", quality=90)
    np.testing.assert_array_equal(read(tmp_path / "a.jpg")[0], np.asarray(Image.open(tmp_path / "a.jpg")))
    Image.fromarray(pixels(np.uint8, 9, 8)).save(tmp_path / "grey.jpg")
    assert read(tmp_path / "grey.jpg").shape == (1, 9, 8, 1)
    palette = Image.fromarray(pixels(np.uint8, 9, 8, 3)).quantize(16)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read(tmp_path / "p.png")[0], np.asarray(palette.convert("RGB")))
    bits = pixels(np.uint8, 9, 8) > 100
    Image.fromarray(bits).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read(tmp_path / "b.png")[0, ..., 0], bits * np.uint8(255))


def test_the_cameras_orientation_is_applied(tmp_path, pixels):
    raw = pixels(np.uint8, 9, 8)
    exif = Image.Exif()
    exif[274] = 6  # turned a quarter clockwise
    Image.fromarray(raw).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "a.png")[0, ..., 0], np.rot90(raw, -1))


def test_pages_of_a_tiff_are_slices(tmp_path, pixels):
    raw = pixels(np.uint16, 4, 6, 5)
    tifffile.imwrite(tmp_path / "a.tif", raw, photometric="minisblack")
    np.testing.assert_array_equal(read(tmp_path / "a.tif")[..., 0], raw)
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        file.write(raw[0], photometric="minisblack")
        file.write(raw[0, :3], photometric="minisblack")
    refused(tmp_path / "b.tif", "mixed_geometry")


def test_white_is_zero(tmp_path, pixels):
    raw = pixels(np.uint8, 6, 5)
    tifffile.imwrite(tmp_path / "a.tif", raw, photometric="miniswhite")
    np.testing.assert_array_equal(read(tmp_path / "a.tif")[0, ..., 0], 255 - raw)


def test_bombs_are_refused_by_what_they_announce(tmp_path):
    head = struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    body = zlib.compress(b"\0" * 10**6)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    refused(tmp_path / "a.png", "too_large")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9), np.uint8))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        for name in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[name].overwrite(60000)
    refused(tmp_path / "a.tif", "too_large")


@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
def test_cut_short(tmp_path, pixels, kind):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(pixels(np.uint8, 64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-700])
    refused(path, "damaged")


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"PK\x03\x04../../etc/passwd", "archive"),
        (b"\x1f\x8b\x08\x00rest", "archive"),
        (b"7z\xbc\xaf\x27\x1c", "archive"),
        (b"\0" * 257 + b"ustar\0", "archive"),
        (b"", "empty"),
        (b"hello", "unknown_format"),
    ],
)
def test_archives_are_not_opened(tmp_path, head, reason):
    (tmp_path / "a.png").write_bytes(head)
    refused(tmp_path / "a.png", reason)
