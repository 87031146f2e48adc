"""NIfTI, MGH, MetaImage and NRRD are read as nibabel and SimpleITK read them."""

import gzip

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfm_jax.data.geometry import LPS_TO_RAS, to_ras
from mmfm_jax.data.readers import kind_of, read_volume
from mmfm_jax.data.refuse import Refused

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")

LIMIT = 10**8


def read(path, limit=LIMIT):
    return read_volume(kind_of(path), [path], limit)


def refused(path, reason: str, limit=LIMIT) -> None:
    with pytest.raises(Refused) as raised:
        read(path, limit)
    assert raised.value.reason == reason, raised.value


def of_itk(image) -> np.ndarray:
    """Its affine to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return LPS_TO_RAS @ affine


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), mirrored=st.booleans())
def test_one_volume_in_every_format_is_one_volume(tmp_path_factory, random_affine, seed, mirrored):
    rng = np.random.default_rng(seed)
    affine = random_affine(rng) @ np.diag([-1.0 if mirrored else 1.0, 1, 1, 1])
    voxels = rng.integers(-1000, 3000, rng.integers(2, 7, 3)).astype(np.int16)  # [k, j, i]
    folder = tmp_path_factory.mktemp("volumes")
    image = nib.Nifti1Image(voxels.T, affine)
    canonical = nib.as_closest_canonical(image)
    nib.save(image, folder / "a.nii.gz")
    nib.save(nib.Nifti2Image(voxels.T, affine), folder / "b.nii")
    nib.save(nib.Nifti1Pair(voxels.T, affine), folder / "c.img")
    nib.save(nib.MGHImage(voxels.T, affine), folder / "d.mgz")
    theirs = sitk.ReadImage(str(folder / "a.nii.gz"))
    for name in ("e.mha", "f.mhd", "g.nrrd", "h.nhdr"):
        sitk.WriteImage(theirs, str(folder / name), useCompression=bool(rng.integers(2)))
    for name in ("a.nii.gz", "b.nii", "c.hdr", "d.mgz", "e.mha", "f.mhd", "g.nrrd", "h.nhdr"):
        volume = read(folder / name)
        np.testing.assert_array_equal(volume.voxels[..., 0], voxels, err_msg=name)
        np.testing.assert_allclose(np.asarray(volume.affine), affine, atol=2e-3, err_msg=name)
        np.testing.assert_allclose(np.asarray(volume.affine), of_itk(theirs), atol=2e-3, err_msg=name)
        turned = to_ras(volume)
        np.testing.assert_array_equal(turned.voxels[..., 0].T, np.asanyarray(canonical.dataobj), err_msg=name)
        np.testing.assert_allclose(np.asarray(turned.affine), canonical.affine, atol=2e-3, err_msg=name)


def test_scaled_values_a_fourth_axis_and_colour(tmp_path):
    rng = np.random.default_rng()
    image = nib.Nifti1Image(rng.normal(size=(3, 4, 5, 6)), np.eye(4))
    image.set_data_dtype(np.int16)  # nibabel chooses scl_slope and scl_inter
    nib.save(image, tmp_path / "four.nii")
    volume = read(tmp_path / "four.nii")
    np.testing.assert_allclose(volume.voxels, nib.load(tmp_path / "four.nii").get_fdata().transpose(2, 1, 0, 3))
    colour = rng.integers(0, 255, (3, 4, 5, 3)).astype(np.uint8)
    packed = np.ascontiguousarray(colour).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nib.save(nib.Nifti1Image(packed, np.eye(4)), tmp_path / "rgb.nii")
    np.testing.assert_array_equal(read(tmp_path / "rgb.nii").voxels, colour.transpose(2, 1, 0, 3))


def test_units_other_than_millimetres(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.diag([0.001, 0.002, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "m.nii")
    np.testing.assert_allclose(np.asarray(read(tmp_path / "m.nii").spacing_mm), (3, 2, 1), rtol=1e-6)


def test_what_does_not_say_left_from_right_is_refused(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), None)
    image.header.set_sform(None, 0)
    image.header.set_qform(None, 0)
    nib.save(image, tmp_path / "unset.nii")
    refused(tmp_path / "unset.nii", "orientation_unknown")
    nib.save(nib.AnalyzeImage(np.zeros((2, 2, 2), np.int16), np.eye(4)), tmp_path / "analyze.img")
    refused(tmp_path / "analyze.hdr", "unsupported")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.mgz"])
def test_damaged_and_oversized(tmp_path, name):
    path = tmp_path / name
    voxels = np.random.default_rng().integers(0, 999, (20, 20, 20)).astype(np.int16)
    if name.endswith((".mha", ".nrrd")):
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    else:
        nib.save((nib.MGHImage if "mgz" in name else nib.Nifti1Image)(voxels, np.eye(4)), path)
    assert read(path).voxels.size == 8000
    refused(path, "too_large", limit=7999)
    whole = path.read_bytes()
    if name.endswith("z"):
        path.write_bytes(gzip.compress(gzip.decompress(whole)[:8000]))
        refused(path, "damaged")
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "damaged")


@pytest.mark.parametrize("name", ["../secret.raw", "/etc/hostname", "sub/x.raw", "..", "link.raw"])
@pytest.mark.parametrize("kind", ["mhd", "nhdr"])
def test_a_header_cannot_point_out_of_its_folder(tmp_path, kind, name):
    (tmp_path / "data/sub").mkdir(parents=True)
    for target in (tmp_path / "secret.raw", tmp_path / "data/sub/x.raw"):
        target.write_bytes(b"\0" * 8)
    (tmp_path / "data/link.raw").symlink_to(tmp_path / "secret.raw")
    header = {
        "mhd": f"NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = {name}\n",
        "nhdr": f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: {name}\n",
    }[kind]
    (tmp_path / f"data/a.{kind}").write_text(header)
    refused(tmp_path / f"data/a.{kind}", "damaged" if name == "link.raw" else "outside_root")
