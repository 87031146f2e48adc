"""Masks land on the voxels of their image, from every format, as their writers meant them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Line

from mmfm_jax.data.geometry import Volume, for_store, mask_for_store, onto
from mmfm_jax.data.readers import DICOM, kind_of, read_volume
from mmfm_jax.data.readers.dicom_segments import even_odd
from mmfm_jax.data.readers.legend import Legend
from mmfm_jax.data.readers.masks import MaskSource, read_mask
from mmfm_jax.data.refuse import Refused

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")
pydicom = pytest.importorskip("pydicom")

LIMIT = 10**8
NAMES = ("liver", "spleen", "vessel")
LEGEND = Legend(NAMES, {}, False)
seeds = st.integers(0, 2**32 - 1)


def reason(function, *arguments, **more) -> str:
    with pytest.raises(Refused) as raised:
        function(*arguments, **more)
    return raised.value.reason


def read(path, image: Volume, legend: Legend = LEGEND) -> np.ndarray:
    return read_mask([MaskSource(kind_of(path), path)], image, legend, LIMIT)


def star(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """A closed line about a centre that does not cross itself, float [points, 2]."""
    n = rng.integers(3, 20)
    angle = np.sort((np.arange(n) + rng.uniform(-0.4, 0.4, n)) * 2 * np.pi / n)
    return centre + (rng.uniform(0.5, 1, n) * radius)[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)


def theirs(contours: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Matplotlib's answer for each contour, joined by exclusive or."""
    y, x = np.indices(shape)
    centres = np.stack([x.ravel(), y.ravel()], -1)
    within = [Line(contour).contains_points(centres) for contour in contours]
    return np.logical_xor.reduce(within).reshape(shape)


# ---------------------------------------------------------------- contours


@settings(max_examples=100, deadline=None)
@given(seed=seeds)
def test_contours_are_filled_as_matplotlib_fills_them_holes_and_all(seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 30)), int(rng.integers(1, 30)))
    contours = [
        star(rng, rng.uniform(-3, 30, 2), float(rng.uniform(0.3, 20))) for _ in range(rng.integers(1, 5))
    ]  # some reach out of the image
    np.testing.assert_array_equal(even_odd(contours, shape), theirs(contours, shape))


def test_a_hole_and_an_island_within_it():
    square = [np.array([[a, a], [9 - a, a], [9 - a, 9 - a], [a, 9 - a]]) - 0.5 for a in (0, 2, 4)]
    expected = np.ones((9, 9), bool)
    expected[2:7, 2:7], expected[4:5, 4:5] = False, True
    np.testing.assert_array_equal(even_odd(square, (9, 9)), expected)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_a_structure_set_is_drawn_on_its_series(tmp_path_factory, random_affine, write_dicom, write_rtstruct, seed):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("rt")
    affine = random_affine(rng)
    shape = tuple(rng.integers(4, 12, 3))
    voxels = rng.integers(-1000, 1000, shape).astype(np.int16)
    paths = write_dicom(folder / "ct", voxels, affine, seed)
    image = read_volume(DICOM, paths, LIMIT)
    expected = np.zeros(shape, np.uint8)
    structures: dict = {"liver": [], "spleen": []}
    for k in range(shape[0]):
        number = int(rng.integers(3))
        if number:
            lines = [star(rng, rng.uniform(0, 10, 2), 5.0) for _ in range(2)]
            points = [np.column_stack([line, np.full(len(line), k)]) for line in lines]
            structures[NAMES[number - 1]] += points
            expected[k][theirs(lines, shape[1:])] = number
    path = write_rtstruct(folder / "rt.dcm", paths[0], affine, structures)
    np.testing.assert_array_equal(read(path, image), expected)


def test_structures_that_do_not_fit(tmp_path, random_affine, write_dicom, write_rtstruct):
    rng = np.random.default_rng()
    affine = random_affine(rng)
    paths = write_dicom(tmp_path / "ct", np.zeros((4, 10, 10), np.int16), affine)
    image = read_volume(DICOM, paths, LIMIT)
    square = np.array([[1.3, 1.3, 2], [8.3, 1.3, 2], [8.3, 8.3, 2], [1.3, 8.3, 2]])

    def of(structures: dict, legend=LEGEND, **change):
        path = write_rtstruct(tmp_path / "rt.dcm", paths[0], affine, structures)
        if change:
            ds = pydicom.dcmread(path)
            for keyword, value in change.items():
                setattr(ds.ROIContourSequence[0].ContourSequence[0], keyword, value)
            ds.save_as(path)
        return read(path, image, legend)

    assert of({"liver": [square]})[2].sum() == 49
    assert reason(of, {"liver": [square + np.array([0, 0, 0.4])]}) == "off_grid"
    assert reason(of, {"liver": [square + np.array([0, 0, 2])]}) == "off_grid"
    assert reason(of, {"liver": [square[:, [2, 0, 1]]]}) == "off_grid"  # across the slices
    assert reason(of, {"Dr. Liver": [square]}) == "unknown_class"
    assert not of({"Dr. Liver": [square]}, Legend(NAMES, {}, True)).any()
    assert of({" Leber ": [square]}, Legend(NAMES, {"Leber": "spleen"}, False)).max() == 2
    assert reason(of, {"liver": [square], "spleen": [square + np.array([2, 2, 0])]}) == "overlapping_segments"
    assert of({"liver": [square], "Leber": [square]}, Legend(NAMES, {"Leber": "liver"}, False))[2].sum() == 49
    assert reason(of, {"liver": [square]}, ContourGeometricType="OPEN_PLANAR") == "unsupported"
    assert reason(of, {"liver": [square]}, ContourData=["1", "2"]) == "damaged"
    assert reason(of, {"liver": [square]}, ContourData=["nan"] * 6) in ("off_grid", "damaged")
    assert reason(read, tmp_path / "rt.dcm", Volume(image.voxels, None)) == "off_grid"


# ---------------------------------------------------------------- segmentations


@settings(max_examples=8, deadline=None)
@given(seed=seeds, kind=st.sampled_from(["BINARY", "LABELMAP"]))
def test_a_segmentation_by_highdicom_lies_on_its_series(
    tmp_path_factory, random_affine, write_dicom, write_seg, seed, kind
):
    hd = pytest.importorskip("highdicom")
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("seg")
    affine = random_affine(rng)
    shape = (int(rng.integers(2, 7)), *rng.integers(3, 9, 2).tolist())  # highdicom pads frames of less than a byte
    mask = rng.integers(0, 4, shape).astype(np.uint8) * (rng.random((shape[0], 1, 1)) < 0.6)  # some slices are empty
    mask[0, 0, 0] = 1
    paths = write_dicom(folder / "ct", rng.integers(0, 99, shape).astype(np.int16), affine, seed)
    path = write_seg(folder / "seg.dcm", paths, mask, list(NAMES), kind)
    image = read_volume(DICOM, paths, LIMIT)
    ours = read(path, image)
    np.testing.assert_array_equal(ours, mask)
    # highdicom's own reading, by its own affine: each of its voxels is ours at the same place.
    volume = hd.seg.segread(path).get_volume(combine_segments=True)
    at = np.argwhere(volume.array) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    index = np.linalg.solve(np.asarray(image.affine), np.column_stack([at * [-1, -1, 1], np.ones(len(at))]).T)[:3].T
    np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
    i, j, k = np.rint(index).astype(int).T
    np.testing.assert_array_equal(ours[k, j, i], volume.array[volume.array > 0])
    assert (ours > 0).sum() == len(at)


def test_segmentations_that_do_not_fit(tmp_path, random_affine, write_dicom, write_seg):
    rng = np.random.default_rng()
    affine = random_affine(rng)
    shape = (4, 6, 5)
    paths = write_dicom(tmp_path / "ct", np.zeros(shape, np.int16), affine)
    image = read_volume(DICOM, paths, LIMIT)
    apart = np.zeros((*shape, 2), bool)
    apart[1:3, :3, :, 0], apart[1:3, 3:, :, 1] = True, True
    path = write_seg(tmp_path / "seg.dcm", paths, apart, ["liver", "spleen"])
    np.testing.assert_array_equal(read(path, image), apart[..., 0] + 2 * apart[..., 1])
    assert reason(read, path, image, Legend(("liver",), {}, False)) == "unknown_class"
    np.testing.assert_array_equal(read(path, image, Legend(("liver",), {}, True)), apart[..., 0])
    united = Legend(("organ",), {"liver": "organ", "spleen": "organ"}, False)
    np.testing.assert_array_equal(read(path, image, united), apart.any(-1))
    moved = np.asarray(image.affine) @ np.array([[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert reason(read, path, Volume(image.voxels, moved)) == "off_grid"
    assert reason(read, path, Volume(image.voxels[:2], image.affine)) == "off_grid"
    assert reason(read, path, Volume(image.voxels[:, :5], image.affine)) == "off_grid"
    apart[1, 3, 2, 0] = True
    both = write_seg(tmp_path / "both.dcm", paths, apart, ["liver", "spleen"])
    assert reason(read, both, image) == "overlapping_segments"
    np.testing.assert_array_equal(read(both, image, united), apart.any(-1))
    ds = pydicom.dcmread(path)
    ds.SegmentationType = "FRACTIONAL"
    ds.save_as(tmp_path / "fraction.dcm")
    assert reason(read, tmp_path / "fraction.dcm", image) == "unsupported"
    path.write_bytes(path.read_bytes()[:-30])
    assert reason(read, path, image) == "damaged"


# ---------------------------------------------------------------- volumes


@settings(max_examples=20, deadline=None)
@given(seed=seeds, name=st.sampled_from(["m.nii.gz", "m.nrrd", "m.mha", "m.mgz"]))
def test_a_volume_with_its_axes_in_any_order_is_turned_onto_its_image(tmp_path_factory, random_affine, seed, name):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("volume") / name
    affine, shape = random_affine(rng), rng.integers(1, 7, 3)
    mask = rng.integers(0, 4, shape).astype(np.uint8)  # [i, j, k]
    orientation = np.stack([rng.permutation(3), rng.choice([-1, 1], 3)], -1)
    turned = nib.Nifti1Image(mask, affine).as_reoriented(orientation)
    if name.endswith("z"):
        nib.save(turned if "nii" in name else nib.MGHImage(np.asanyarray(turned.dataobj), turned.affine), path)
    else:
        nib.save(turned, path.with_name("m.nii"))
        sitk.WriteImage(sitk.ReadImage(str(path.with_name("m.nii"))), str(path))
    image = Volume(np.zeros((*shape[::-1], 1), np.int16), affine)
    np.testing.assert_array_equal(read(path, image), mask.T)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_a_resampled_mask_is_simpleitks_nearest_neighbour_on_the_grid_of_the_resampled_image(random_affine, seed):
    rng = np.random.default_rng(seed)
    affine = random_affine(rng)
    shape = rng.integers(2, 9, 3)
    mask = rng.integers(0, 4, shape).astype(np.uint8)  # [k, j, i]
    image = Volume(rng.normal(size=(*shape, 1)).astype(np.float32), affine)
    target = rng.uniform(0.5, 3, 3).tolist()
    ours = mask_for_store(mask, image, spacing_mm=target)
    voxels, spacing = for_store(image, dtype="float32", channels=1, spacing_mm=target)
    assert ours.shape == voxels.shape[:3] and ours.dtype == np.uint8
    canonical = nib.as_closest_canonical(nib.Nifti1Image(mask.T, affine))
    native = nib.affines.voxel_sizes(canonical.affine)[::-1]
    theirs = sitk.GetImageFromArray(np.asanyarray(canonical.dataobj).T.astype(np.uint8))
    theirs.SetSpacing(native[::-1].tolist())
    size = np.array(ours.shape)
    origin = (np.array(theirs.GetSize()[::-1]) - 1) / 2 * native - (size - 1) / 2 * np.array(spacing)
    grid = sitk.Resample(
        theirs, size[::-1].tolist(), sitk.Transform(), sitk.sitkNearestNeighbor, origin[::-1].tolist(),
        list(spacing[::-1]), np.eye(3).ravel().tolist(), 255,
    )  # fmt: skip
    theirs = sitk.GetArrayFromImage(grid)
    at = [(origin[a] + np.arange(size[a]) * spacing[a]) / native[a] for a in range(3)]
    # Half-way between two voxels either is nearest.
    clear = [(c > -0.5) & (c < n - 0.5) & (np.abs(c % 1 - 0.5) > 1e-6) for c, n in zip(at, canonical.shape[::-1])]
    within = np.ix_(*clear)
    np.testing.assert_array_equal(ours[within], theirs[within])


def test_volumes_on_other_grids():
    rng = np.random.default_rng()
    image = Volume(np.zeros((4, 5, 6, 1)), np.diag([1.0, 2, 3, 1]))
    mask = Volume(rng.integers(0, 2, (4, 5, 6, 1)), np.diag([1.0, 2, 3, 1]))
    np.testing.assert_array_equal(onto(mask, image), mask.voxels[..., 0])
    for row, column, by in [(0, 3, 0.2), (1, 3, -2), (2, 2, 0.2), (0, 1, 0.1)]:
        affine = np.diag([1.0, 2, 3, 1])
        affine[row, column] += by
        assert reason(onto, Volume(mask.voxels, affine), image) in ("off_grid", "sheared")
    assert reason(onto, Volume(mask.voxels[:3], image.affine), image) == "off_grid"
    assert reason(onto, Volume(mask.voxels, None), image) == "off_grid"
    pictures = Volume(mask.voxels, None), Volume(image.voxels, None)
    np.testing.assert_array_equal(onto(*pictures), mask.voxels[..., 0])
    assert reason(onto, Volume(mask.voxels[:, :4], None), pictures[1]) == "off_grid"


def test_numbers_of_voxels_and_the_classes_they_mean():
    voxels = np.array([[[0, 1, 3, 2]]])
    np.testing.assert_array_equal(LEGEND.of_voxels(voxels), voxels)
    np.testing.assert_array_equal(LEGEND.of_voxels(voxels.astype(np.float64) + 1e-5), voxels)
    assert reason(LEGEND.of_voxels, voxels + 1) == "unknown_class"
    assert reason(LEGEND.of_voxels, voxels - 1) == "unknown_class"
    assert reason(LEGEND.of_voxels, voxels / 2) == "not_a_mask"
    assert reason(LEGEND.of_voxels, voxels + np.array([np.nan, 0, 0, 0])) == "not_a_mask"
    assert reason(LEGEND.of_voxels, voxels * 1e9) == "not_a_mask"
    freesurfer = Legend(NAMES, {"14175": "vessel", "17": "liver", "53": "liver"}, True)
    np.testing.assert_array_equal(
        freesurfer.of_voxels(np.array([[[14175, 53, 0], [17, 1, -5]]])), [[[3, 1, 0], [1, 0, 0]]]
    )
    assert reason(Legend(NAMES, {"17": "liver"}, False).of_voxels, np.array([[[17, 1]]])) == "unknown_class"


def test_a_file_for_each_segment(tmp_path, random_affine):
    rng = np.random.default_rng()
    affine, shape = random_affine(rng), rng.integers(2, 7, 3)
    image = Volume(np.zeros((*shape[::-1], 1), np.int16), affine)
    mask = rng.integers(0, 5, shape)  # [i, j, k] of liver, left and right kidney, and what is not declared
    mask[0, 0, 0], mask[-1, -1, -1] = 1, 2
    legend = Legend(("liver", "kidneys"), {"kidney_left": "kidneys", "kidney_right": "kidneys"}, True)
    files = []
    for number, segment in enumerate(("liver", "kidney_left", "kidney_right", "vena_cava"), 1):
        path = tmp_path / f"{segment}.nii.gz"
        nib.save(nib.Nifti1Image(255 * (mask == number).astype(np.uint8), affine), path)
        files.append(MaskSource(kind_of(path), path, segment))
    expected = np.array([0, 1, 2, 2, 0], np.uint8)[mask.T]
    np.testing.assert_array_equal(read_mask(files, image, legend, LIMIT), expected)
    strict = Legend(legend.classes, legend.values, False)
    assert reason(read_mask, files, image, strict, LIMIT) == "unknown_class"
    np.testing.assert_array_equal(read_mask(files[:2], image, strict, LIMIT), (mask.T == 1) + 2 * (mask.T == 2))
    for change, expected in (
        (lambda v: np.ones_like(v), "overlapping_segments"),
        (lambda v: np.arange(v.size).reshape(v.shape).astype(np.uint8), "not_a_mask"),
        (lambda v: v[1:], "off_grid"),
    ):
        nib.save(nib.Nifti1Image(change((mask == 2).astype(np.uint8)), affine), files[1].path)
        with pytest.raises(Refused, match="its file of kidneys: ") as raised:
            read_mask(files, image, legend, LIMIT)
        assert raised.value.reason == expected
