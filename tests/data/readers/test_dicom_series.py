"""A DICOM series becomes one volume where SimpleITK and nibabel say it is, or is refused for a named reason."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfm_jax.data.geometry import LPS_TO_RAS, to_ras
from mmfm_jax.data.readers.dicom import read_header
from mmfm_jax.data.readers.dicom_series import read_series
from mmfm_jax.data.refuse import Refused

pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")
nib = pytest.importorskip("nibabel")

LIMIT = 10**8


def refused(paths, reason: str) -> Refused:
    with pytest.raises(Refused) as raised:
        read_series(paths, LIMIT)
    assert raised.value.reason == reason
    return raised.value


def edit(path, **tags):
    ds = pydicom.dcmread(path)
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.save_as(path)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_random_affines_agree_with_simpleitk_and_nibabel(tmp_path_factory, write_dicom, random_affine, seed):
    rng = np.random.default_rng(seed)
    affine = random_affine(rng)
    voxels = rng.integers(-1000, 3000, rng.integers(2, 7, 3)).astype(np.int16)
    folder = tmp_path_factory.mktemp("series")
    volume = read_series(sorted(write_dicom(folder, voxels, affine, seed)), LIMIT)  # names are shuffled
    np.testing.assert_array_equal(volume.voxels[..., 0], voxels)
    np.testing.assert_allclose(np.asarray(volume.affine), affine, atol=1e-5)

    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)
    theirs = np.eye(4)
    theirs[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    theirs[:3, 3] = image.GetOrigin()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume.voxels[..., 0])
    np.testing.assert_allclose(LPS_TO_RAS @ theirs, np.asarray(volume.affine), atol=1e-3)

    turned = to_ras(volume)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(volume.voxels[..., 0].T, volume.affine))
    np.testing.assert_array_equal(turned.voxels[..., 0].T, np.asanyarray(canonical.dataobj))
    np.testing.assert_allclose(np.asarray(turned.affine), canonical.affine, atol=1e-6)


def test_values_are_rescaled_to_hu_slice_by_slice(tmp_path, write_dicom):
    raw = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    paths = write_dicom(tmp_path, raw, np.diag([1, 1, 2, 1.0]), RescaleSlope="2", RescaleIntercept="-1024")
    np.testing.assert_array_equal(read_series(paths, LIMIT).voxels[..., 0], raw * 2 - 1024)
    edit(paths[1], RescaleSlope="0.5")  # as PET does
    values = read_series(paths, LIMIT).voxels[..., 0]
    np.testing.assert_allclose(values[1], raw[1] * 0.5 - 1024)
    np.testing.assert_allclose(values[2], raw[2] * 2 - 1024)


def test_monochrome1_is_turned_round_but_not_for_ct(tmp_path, write_dicom):
    raw = np.random.default_rng().integers(0, 4096, (1, 6, 5)).astype(np.uint16)
    same = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    (path,) = write_dicom(tmp_path / "dx", raw, np.eye(4), Modality="DX", **same)
    np.testing.assert_array_equal(read_series([path], LIMIT).voxels[..., 0], 4095 - raw)
    (path,) = write_dicom(tmp_path / "ct", raw, np.eye(4), **same)
    np.testing.assert_array_equal(read_series([path], LIMIT).voxels[..., 0], raw)


def test_an_enhanced_object_takes_each_frames_plane_and_rescale(tmp_path, write_dicom, random_affine):
    rng = np.random.default_rng()
    affine, raw = random_affine(rng), rng.integers(0, 500, (5, 4, 6)).astype(np.int16)
    paths = write_dicom(tmp_path, raw, affine)
    ds = pydicom.dcmread(paths[0])
    order = rng.permutation(5)
    frames = []
    for k in order:
        one = pydicom.dcmread(paths[k])
        plane, values = pydicom.Dataset(), pydicom.Dataset()
        plane.ImagePositionPatient = one.ImagePositionPatient
        values.RescaleSlope, values.RescaleIntercept = "1", str(k)
        frame = pydicom.Dataset()
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [plane], [values]
        frames.append(frame)
    shared, turn, measures = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    turn.ImageOrientationPatient, measures.PixelSpacing = ds.ImageOrientationPatient, ds.PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [turn], [measures]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(ds, keyword)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], frames
    ds.NumberOfFrames, ds.PixelData = 5, raw[order].tobytes()
    ds.save_as(tmp_path / "enhanced.dcm")
    volume = read_series([tmp_path / "enhanced.dcm"], LIMIT)
    np.testing.assert_array_equal(volume.voxels[..., 0], raw + np.arange(5)[:, None, None])
    np.testing.assert_allclose(np.asarray(volume.affine), affine, atol=1e-5)


def test_planes_of_a_dose_lie_along_the_normal(tmp_path, write_dicom, random_affine):
    rng = np.random.default_rng()
    affine, raw = random_affine(rng), rng.integers(0, 500, (4, 3, 5)).astype(np.uint16)
    first = write_dicom(tmp_path, raw[:1], affine, Modality="RTDOSE")[0]
    offsets = [f"{k * np.linalg.norm(affine[:3, 2]):.10g}" for k in range(4)]
    edit(first, NumberOfFrames=4, GridFrameOffsetVector=offsets, DoseGridScaling="0.25", PixelData=raw.tobytes())
    volume = read_series([first], LIMIT)
    np.testing.assert_allclose(volume.voxels[..., 0], raw * 0.25)
    np.testing.assert_allclose(np.asarray(volume.affine), affine, atol=1e-5)


def test_compressed_pixels_equal_the_uncompressed(tmp_path, write_dicom):
    raw = np.random.default_rng().integers(0, 255, (1, 32, 32)).astype(np.uint16)
    (path,) = write_dicom(tmp_path, raw, np.eye(4))
    for syntax in (pydicom.uid.RLELossless, pydicom.uid.JPEG2000Lossless):
        ds = pydicom.dcmread(path)
        ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(tmp_path / "compressed.dcm")
        np.testing.assert_array_equal(read_series([tmp_path / "compressed.dcm"], LIMIT).voxels[..., 0], raw)


# ---------------------------------------------------------------- refused


@pytest.fixture
def even(tmp_path, write_dicom):
    return write_dicom(tmp_path, np.zeros((9, 4, 4), np.int16), np.diag([1, 1, 2.5, 1.0]))


def test_a_missing_slice_is_told_from_uneven_ones(even):
    assert "2 are missing of 9" in refused([*even[:4], *even[6:]], "missing_slices").detail
    edit(even[4], ImagePositionPatient=[0, 0, 2.5 * 4 + 0.9])
    refused(even, "uneven_slices")
    edit(even[4], ImagePositionPatient=[0, 0, 2.5 * 4 + 0.05])  # rounding
    assert read_series(even, LIMIT).voxels.shape == (9, 4, 4, 1)


def test_two_slices_at_one_place(even):
    refused([*even, even[3]], "duplicate_slices")


def test_a_tilted_gantry(tmp_path, write_dicom):
    sheared = np.diag([1, 1, 2.5, 1.0])
    sheared[1, 2] = 0.6
    error = refused(write_dicom(tmp_path, np.zeros((5, 4, 4), np.int16), sheared), "gantry_tilt")
    assert f"{np.degrees(np.arctan(0.6 / 2.5)):.1f} degrees" in error.detail


def test_slices_that_disagree(even):
    edit(even[2], PixelSpacing=[1, 1.1])
    refused(even, "mixed_geometry")
    edit(even[2], PixelSpacing=[1, 1], ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    refused(even, "mixed_geometry")


def test_a_header_that_announces_too_much_is_refused_before_anything_is_decoded(even):
    edit(even[0], Rows=60000, Columns=60000, NumberOfFrames=1000)
    refused(even, "too_large")
    assert read_header(even[0]).voxels == 60000**2 * 1000


def test_cut_short(even):
    even[0].write_bytes(even[0].read_bytes()[:-10])
    refused(even, "damaged")


def test_one_slice_without_thickness_needs_one(even):
    edit(even[0], SliceThickness=None)
    refused(even[:1], "spacing_unknown")
    volume = read_series(even[:1], LIMIT, slice_mm=3.0)
    assert volume.spacing_mm == (3.0, 1.0, 1.0)
