"""Masks of every format end beside their image in the store, or in the rejects with a reason, and cost it nothing."""

from pathlib import Path

import numpy as np
import pytest

from mmfm_jax.data.geometry import nearest
from mmfm_jax.data.ingest.pool import Pool
from mmfm_jax.data.refuse import Refused
from mmfm_jax.data.store.study_store import StudyStore

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")
nib = pytest.importorskip("nibabel")
AFFINE = np.diag([-0.7, -0.7, 2.5, 1.0])
CT = {"files": ["dicom/**"], "modality": "CT", "study_tag": "AccessionNumber"}
ORGANS = {
    "image": "ct",
    "files": ["dicom/**", "masks/*"],
    "path": "[a-z]+/(?P<patient>[^/_]+)[/_](?P<study>[^/_.]+).*",
    "classes": ["liver", "spleen"],
    "values": {"Liver of Quux": "liver"},
}
ONLY = {"tables": {}, "texts": {}, "columns": {}, "labels": {}, "images": {"ct": CT}}


def ct_of(hospital, patient: str, study: str) -> tuple[list[Path], np.ndarray]:
    """Files slice by slice, and their voxels [k, j, i]."""
    folder = hospital.exports / f"dicom/{patient}/{study}"
    held = [(float(pydicom.dcmread(p).ImagePositionPatient[2]), p) for p in folder.glob("[0-9]*.dcm")]
    return [path for _, path in sorted(held)], hospital.volumes[patient, study][:, ::-1, ::-1]


@pytest.fixture
def masks(hospital, write_seg, write_rtstruct) -> dict[tuple[str, str], np.ndarray]:
    """Masks, RAS [z, y, x], of four studies: a SEG and an RTSTRUCT between the images, two NIfTI files beside them."""
    rng, held = np.random.default_rng(5), {}
    for study in [("MRN1000", "ACC0"), ("MRN1000", "ACC1"), ("MRN1001", "ACC2"), ("MRN1001", "ACC3")]:
        paths, voxels = ct_of(hospital, *study)
        mask = rng.integers(0, 3, voxels.shape).astype(np.uint8)
        mask[0, 0, :2] = 1, 2
        if study[1] == "ACC0":
            write_seg(paths[0].with_name("segmentation.dcm"), paths, mask, ["Liver of Quux", "spleen"])
        elif study[1] == "ACC1":
            contours: dict = {"Liver of Quux": [], "spleen": []}
            for k, j, i in np.argwhere(mask):  # a square around each voxel
                corners = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
                contours[["Liver of Quux", "spleen"][mask[k, j, i] - 1]].append(corners + np.array([i, j, k]))
            write_rtstruct(paths[0].with_name("structures.dcm"), paths[0], AFFINE, contours)
        else:
            (hospital.exports / "masks").mkdir(exist_ok=True)
            path = hospital.exports / f"masks/{study[0]}_{study[1]}.nii.gz"
            nib.save(nib.as_closest_canonical(nib.Nifti1Image(mask.T, AFFINE)), path)
        held[study] = mask[:, ::-1, ::-1]
    hospital.describe(ONLY | {"masks": {"organs": ORGANS}})
    return held


def rows_of(store: StudyStore, hospital) -> dict[tuple[str, str], int]:
    """Rows by identifiers, matched by the image."""
    rows = {}
    for row in range(len(store)):
        info = store.volume_info("ct", row)
        assert info is not None
        voxels = store.crop("ct", row, (0, 0, 0), info[0])[..., 0]
        rows |= {study: row for study, held in hospital.volumes.items() if np.array_equal(voxels, held)}
    return rows


def whole(store: StudyStore, name: str, row: int) -> np.ndarray | None:
    info = store.volume_info("ct", row)
    assert info is not None
    return None if store.mask_voxels(name, row) is None else store.mask_crop(name, row, (0, 0, 0), info[0])


def reasons(outcome) -> list[tuple[str, str]]:
    return sorted((reject.part, reject.reason) for reject in outcome.rejects)


def adds_up(outcome) -> None:
    for source, counts in outcome.counts.items():
        assert counts.inputs == counts.taken + counts.refused
        assert len({r.file for r in outcome.rejects if r.source == source and not r.part}) == counts.refused


def test_masks_of_every_format_lie_on_their_image(hospital, masks, tmp_path):
    outcome = hospital.ingest(tmp_path / "store")
    assert outcome.rejects == []
    adds_up(outcome)
    assert outcome.counts["images"].inputs == sum(len(v) for v in hospital.volumes.values()) + 4
    store = StudyStore.open(str(tmp_path / "store"))
    store.verify()
    rows = rows_of(store, hospital)
    assert sorted(rows) == sorted(hospital.volumes)
    for study, row in rows.items():
        held = whole(store, "organs", row)
        if study not in masks:
            assert held is None
            continue
        np.testing.assert_array_equal(held, masks[study])
    every = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"of Quux" not in every and b"MRN10" not in every


def test_masks_follow_their_image_to_another_spacing(hospital, masks, tmp_path):
    target = (1.25, 0.6, 1.0)
    hospital.describe(ONLY | {"images": {"ct": CT | {"spacing_mm": target}}, "masks": {"organs": ORGANS}})
    assert hospital.ingest(tmp_path / "store").rejects == []
    store = StudyStore.open(str(tmp_path / "store"))
    found = [held for row in range(len(store)) if (held := whole(store, "organs", row)) is not None]
    expected = [nearest(mask, (2.5, 0.7, 0.7), target) for mask in masks.values()]
    assert sorted(m.tobytes() for m in found) == sorted(m.tobytes() for m in expected)


def test_a_mask_that_cannot_be_taken_says_why_and_leaves_its_image(
    hospital, masks, tmp_path, write_seg, write_rtstruct
):
    exports = hospital.exports
    paths, _ = ct_of(hospital, "MRN1002", "ACC4")
    # Of a series that is not there, of no series at all, and of a study without an image.
    others, there = ct_of(hospital, "MRN1002", "ACC5")
    write_seg(paths[0].with_name("elsewhere.dcm"), others, np.ones_like(there), ["spleen"])
    square = np.array([[0.2, 0.2, 0], [2, 0.2, 0], [2, 2, 0]])
    write_rtstruct(paths[0].with_name("unreferenced.dcm"), paths[0], AFFINE, {"spleen": [square]}, refer=False)
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), AFFINE), exports / "masks/MRN7_ACC7.nii")
    # Two for one study, another grid, a class that is not declared, a cut file.
    for name in ("a", "b"):
        (exports / f"masks/MRN1002_ACC5.{name}.nii").write_bytes((exports / "masks/MRN7_ACC7.nii").read_bytes())
    path = exports / "masks/MRN1001_ACC2.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), AFFINE), path)
    path = exports / "masks/MRN1001_ACC3.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj) + np.uint8(2), image.affine), path)
    path = exports / "dicom/MRN1000/ACC0/segmentation.dcm"
    path.write_bytes(path.read_bytes()[:-20])
    outcome = hospital.ingest(tmp_path / "store")
    adds_up(outcome)
    assert reasons(outcome) == sorted(
        ("", reason)
        for reason in (
            "other_image", "no_reference", "image_missing", "several_masks", "several_masks", "off_grid",
            "unknown_class", "damaged",
        )
    )  # fmt: skip
    store = StudyStore.open(str(tmp_path / "store"))
    store.verify()
    rows = rows_of(store, hospital)
    assert sorted(rows) == sorted(hospital.volumes)
    held = {study for study, row in rows.items() if whole(store, "organs", row) is not None}
    assert held == {("MRN1000", "ACC1")}
    again = hospital.ingest(tmp_path / "store")
    assert not again.built and again.rejects == outcome.rejects


def test_one_file_may_be_for_several_masks_which_may_overlap(hospital, tmp_path, write_seg):
    paths, voxels = ct_of(hospital, "MRN1000", "ACC0")
    both = np.random.default_rng().random((*voxels.shape, 2)) < 0.6
    both[0, 0, 0] = True
    write_seg(hospital.exports / "segs/a.dcm", paths, both, ["liver", "lesion"])
    mask = {"image": "ct", "files": ["segs/*"], "others": "background"}
    described = {
        "organs": mask | {"classes": ["liver"]},
        "lesions": mask | {"classes": ["lesion"]},
        "all": mask | {"classes": ["liver", "lesion"]},
        "strict": mask | {"classes": ["lesion"], "others": "refuse"},
    }
    hospital.describe(ONLY | {"masks": described})
    outcome = hospital.ingest(tmp_path / "store")
    adds_up(outcome)
    assert reasons(outcome) == [("all", "overlapping_segments"), ("strict", "unknown_class")]
    store = StudyStore.open(str(tmp_path / "store"))
    row = rows_of(store, hospital)["MRN1000", "ACC0"]
    for index, name in enumerate(("organs", "lesions")):
        np.testing.assert_array_equal(whole(store, name, row), both[:, ::-1, ::-1, index])
    assert whole(store, "all", row) is None


def test_segmentations_that_no_mask_asks_for_and_images_that_only_masks_ask_for(hospital, masks, tmp_path):
    hospital.describe(ONLY)
    outcome = hospital.ingest(tmp_path / "none")
    assert reasons(outcome) == [("", "no_mask")] * 2
    ct = CT | {"files": ["dicom/MRN1000/**"]}
    hospital.describe(ONLY | {"images": {"ct": ct}, "masks": {"organs": ORGANS}})
    outcome = hospital.ingest(tmp_path / "some")
    adds_up(outcome)
    others = sum(len(v) for (patient, _), v in hospital.volumes.items() if patient != "MRN1000")
    assert reasons(outcome) == [("", "image_missing")] * 2 + [("", "not_a_mask")] * others


def test_masks_named_by_a_table(hospital, masks, tmp_path):
    for row in hospital.rows:
        row["mask"] = f"masks/{row['mrn']}_{row['accession']}.nii.gz" if row["mrn"] == "MRN1001" else ""
    hospital.write_table()
    visits = {"visits": {"file": "visits.csv", "patient": "mrn", "study": "accession"}}
    mask = {"image": "ct", "table": "visits", "column": "mask", "classes": ["liver", "spleen"]}
    age = {"age": {"kind": "number", "unit": "years"}}
    for path in hospital.exports.glob("dicom/**/s*.dcm"):
        path.unlink()
    hospital.describe(ONLY | {"tables": visits, "columns": age, "masks": {"organs": mask}})
    outcome = hospital.ingest(tmp_path / "store")
    assert outcome.rejects == []
    store = StudyStore.open(str(tmp_path / "store"))
    for study, row in rows_of(store, hospital).items():
        held = whole(store, "organs", row)
        if study[0] == "MRN1001":
            np.testing.assert_array_equal(held, masks[study])
        else:
            assert held is None


def test_a_mask_that_ends_its_reader_costs_the_mask_alone(hospital, masks, tmp_path, monkeypatch):
    run = Pool.run

    def crash(pool, function, tasks):
        tasks = list(tasks)
        for index, result in run(pool, function, tasks):
            yield index, Refused("crashed", "its reader ended") if getattr(tasks[index], "masks", ()) else result

    monkeypatch.setattr(Pool, "run", crash)
    outcome = hospital.ingest(tmp_path / "store")
    adds_up(outcome)
    assert reasons(outcome) == [("", "crashed")] * 4
    store = StudyStore.open(str(tmp_path / "store"))
    assert sorted(rows_of(store, hospital)) == sorted(hospital.volumes)
    assert not store.counts["train"].masks


def test_added_to_it_is_the_store_of_the_whole_and_what_was_refused_is_said_again(
    hospital, masks, tmp_path, same_bytes
):
    late = hospital.exports / "masks/MRN1001_ACC3.nii.gz"
    kept = late.read_bytes()
    late.unlink()
    bad = hospital.exports / "masks/MRN1002_ACC4.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), AFFINE), bad)
    assert reasons(hospital.ingest(tmp_path / "grown")) == [("", "off_grid")]
    late.write_bytes(kept)
    hospital.admit("MRN1009", "ACC9", seed=9)
    changed = hospital.exports / "masks/MRN1001_ACC2.nii.gz"  # of an image that is in the store already
    nib.save(nib.Nifti1Image(np.asanyarray(nib.load(changed).dataobj) // 2, nib.load(changed).affine), changed)
    whole = hospital.ingest(tmp_path / "whole")
    grown = hospital.ingest(tmp_path / "grown", append=True)
    assert grown.built and grown.rejects == whole.rejects and reasons(grown) == [("", "off_grid")]
    assert same_bytes(tmp_path / "grown", tmp_path / "whole")


def test_a_file_for_each_segment_of_a_study(hospital, masks, tmp_path):
    (hospital.exports / "parts").mkdir()
    for (patient, study), mask in masks.items():
        for number, segment in enumerate(("Liver of Quux", "spleen"), 1):
            voxels = (mask[:, ::-1, ::-1] == number).astype(np.uint8)  # [k, j, i]
            path = hospital.exports / f"parts/{patient}_{study}/{segment}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(voxels.T, AFFINE), path)
    files = {"files": ["parts/**"], "path": "parts/(?P<patient>[^/_]+)_(?P<study>[^/]+)/(?P<segment>[^.]+).nii.gz"}
    described = {"organs": ORGANS | files, "one": ORGANS | files | {"path": ORGANS["path"]}}
    for path in hospital.exports.glob("dicom/**/s*.dcm"):
        path.unlink()
    bad = hospital.exports / "parts/MRN1001_ACC2/spleen.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((2, 2, 2), np.uint8), AFFINE), bad)
    hospital.describe(ONLY | {"masks": described})
    outcome = hospital.ingest(tmp_path / "store")
    adds_up(outcome)
    assert reasons(outcome) == sorted([("", "off_grid")] * 2 + [("one", "several_masks")] * 6)
    store = StudyStore.open(str(tmp_path / "store"))
    for study, row in rows_of(store, hospital).items():
        held = whole(store, "organs", row)
        if study in masks and study[1] != "ACC2":
            np.testing.assert_array_equal(held, masks[study])
        else:
            assert held is None
    every = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"of Quux" not in every
