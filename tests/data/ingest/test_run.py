"""From exports to a store: everything joined, everything counted, the same bytes however often it was killed."""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from datetime import date

import numpy as np
import pytest

from mmfm_jax.data.deid.identifiers import Hider
from mmfm_jax.data.split import split_of
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.errors import UserError

pytest.importorskip("pydicom")
pytest.importorskip("PIL")
KEY = "a key of the tests, long enough"


def by_study(store: StudyStore, hospital) -> dict[tuple[str, str], int]:
    """Rows of the store by identifiers, matched by the voxels."""
    rows = {}
    for row in range(len(store)):
        info = store.volume_info("ct", row)
        if info is None:
            continue
        voxels = store.crop("ct", row, (0, 0, 0), info[0])[..., 0]
        for study, expected in hospital.volumes.items():
            if voxels.shape == expected.shape and (voxels == expected).all():
                rows[study] = row
    return rows


def geometry(store: StudyStore, row: int, role: str = "ct") -> tuple[tuple, tuple]:
    """Shape and spacing of an image that must be there."""
    info = store.volume_info(role, row)
    assert info is not None
    return info


def reasons(outcome) -> dict[tuple[str, str], int]:
    counted: dict = {}
    for reject in outcome.rejects:
        key = (reject.part or reject.source, reject.reason)
        counted[key] = counted.get(key, 0) + 1
    return counted


def adds_up(outcome) -> None:
    for source, counts in outcome.counts.items():
        assert counts.inputs == counts.taken + counts.refused
        whole = {(r.file, r.row) for r in outcome.rejects if r.source == source and not r.part}
        assert len(whole) == counts.refused, source


# ---------------------------------------------------------------- what is taken


def test_everything_of_a_study_is_joined(hospital, tmp_path):
    outcome = hospital.ingest(tmp_path / "store")
    assert outcome.rejects == [] and outcome.built
    adds_up(outcome)
    assert {s: c.inputs for s, c in outcome.counts.items()} == {
        "images": sum(len(v) for v in hospital.volumes.values()) + 6,
        "tables.visits": 6,
        "texts": 6,
    }
    store = StudyStore.open(str(tmp_path / "store"))
    store.verify()
    rows = by_study(store, hospital)
    assert sorted(rows) == sorted(hospital.volumes) and len(store) == 6
    hider = Hider(KEY)
    for (patient, study), row in rows.items():
        texts, values, labels = store.table(row)
        seed = int(study[3:])
        assert store.patients(np.array([row]))[0] == hider.patient(patient)
        assert row in store.rows(split_of(patient, KEY))
        assert texts["findings"] == (f"Nodule {seed % 7 + 1} mm, see [REMOVED].",)
        assert texts["note"] == ("[REMOVED] is well, says Dr. [NAME].",)
        shifted = (date(2021, 3, 4) - date(1970, 1, 1)).days - hider.shift_days(patient)
        born = (date(1960, 3, 4) - date(2021, 3, 4)).days
        assert values == {"age": 61.5, "sex": "female", "seen": shifted, "born": born, "kvp": 120.0}
        assert labels == {"nodule": seed % 2}
        np.testing.assert_allclose(geometry(store, row)[1], (2.5, 0.7, 0.7))
        assert store.volume_info("photo", row) == ((1, 6, 5), (1.0, 1.0, 1.0))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []  # the work folder is gone


def test_patients_stand_in_the_order_of_hashes_and_their_studies_in_that_of_the_table(hospital, tmp_path):
    hospital.rows.reverse()
    hospital.write_table()
    hospital.ingest(tmp_path / "store")
    store = StudyStore.open(str(tmp_path / "store"))
    patients = store.patients(np.arange(len(store))).tolist()
    assert patients == sorted(patients)
    rows = by_study(store, hospital)
    assert all(rows[f"MRN{1000 + i}", f"ACC{2 * i + 1}"] < rows[f"MRN{1000 + i}", f"ACC{2 * i}"] for i in range(3))


def test_a_study_may_be_text_alone_or_a_row_alone(hospital, tmp_path):
    (hospital.exports / "notes/MRN9_ACC9.txt").write_text("Nothing but text.")
    hospital.rows.append(dict.fromkeys(hospital.rows[0], "") | {"mrn": "MRN8", "accession": "ACC8", "age": "40"})
    hospital.write_table()
    assert hospital.ingest(tmp_path / "store").rejects == []
    store = StudyStore.open(str(tmp_path / "store"))
    held = [store.table(row) for row in range(len(store)) if store.volume_info("ct", row) is None]
    assert sorted(held, key=str) == sorted(
        [({"note": ("Nothing but text.",)}, {}, {}), ({}, {"age": 40.0}, {})], key=str
    )


def test_target_spacing(hospital, tmp_path):
    ct = {"files": ["dicom/**"], "study_tag": "AccessionNumber", "spacing_mm": [1.25, 1.4, 1.4]}
    hospital.describe({"images": {"ct": ct}, "texts": {}, "labels": {}})
    hospital.ingest(tmp_path / "store")
    store = StudyStore.open(str(tmp_path / "store"))
    native = sorted(tuple(v.shape) for v in hospital.volumes.values())
    shapes = sorted(geometry(store, row)[0] for row in range(len(store)))
    assert shapes == sorted((2 * z, (y + 1) // 2, (x + 1) // 2) for z, y, x in native)
    assert {geometry(store, row)[1] for row in range(len(store))} == {(1.25, 1.4, 1.4)}


def test_images_named_by_a_table(hospital, tmp_path):
    for row in hospital.rows:
        row["where"] = f"dicom/{row['mrn']}/{row['accession']}"
    hospital.rows[0]["where"] = "../hospital/key.txt"
    hospital.rows[1]["where"] = "dicom/nowhere"
    hospital.write_table()
    hospital.describe({"images": {"ct": {"table": "visits", "column": "where"}}, "texts": {}})
    outcome = hospital.ingest(tmp_path / "store")
    adds_up(outcome)
    assert reasons(outcome) == {("ct", "outside_root"): 1, ("ct", "missing_file"): 1}
    assert len(by_study(StudyStore.open(str(tmp_path / "store")), hospital)) == 4


def test_split_by_column(hospital, tmp_path):
    for row in hospital.rows:
        row["fold"] = "train" if row["mrn"] == "MRN1000" else "test"
    hospital.rows[-1]["fold"] = "train"  # of MRN1002, who is in test too
    hospital.write_table()
    hospital.describe({"split": {"column": "fold"}})
    outcome = hospital.ingest(tmp_path / "store")
    adds_up(outcome)
    assert set(reasons(outcome)) == {(s, "bad_split") for s in ("images", "tables.visits", "texts")}
    store = StudyStore.open(str(tmp_path / "store"))
    hider = Hider(KEY)
    for split, patient in (("train", "MRN1000"), ("test", "MRN1001")):
        assert set(store.patients(store.rows(split))) == {hider.patient(patient)}


# ---------------------------------------------------------------- what is refused


def test_every_input_that_is_not_taken_has_a_reason(hospital, tmp_path):
    exports = hospital.exports
    series = sorted((exports / "dicom/MRN1000/ACC0").iterdir())
    series[0].write_bytes(series[0].read_bytes()[:-20])
    hospital.admit("MRN2000", "ACC20", seed=20, BodyPartExamined="HEAD")
    hospital.admit("MRN2001", "ACC21", seed=21, Modality="MR")
    hospital.admit("MRN2002", "ACC22", seed=22, PatientID="")
    (exports / "dicom/readme.txt").write_text("see MRN1000")
    (exports / "dicom/empty.dcm").touch()
    (exports / "notes/nobody.txt").write_text("?")
    (exports / "notes/MRN1001_ACC2.txt").write_bytes(b"\xff\xfe\xfa")
    (exports / "photos/MRN1001_ACC2.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    hospital.rows[1]["age"], hospital.rows[2]["sex"], hospital.rows[3]["seen"] = "old", "X", "yesterday"
    hospital.rows[4]["nodule"], hospital.rows[5]["report"] = "maybe", "no headings"
    hospital.rows.append(hospital.rows[0] | {"age": "62.5"})
    hospital.rows.append(hospital.rows[0] | {"mrn": ""})
    hospital.rows.append(dict.fromkeys(hospital.rows[0], "") | {"mrn": "MRN7", "accession": "ACC7"})
    hospital.write_table()
    outcome = hospital.ingest(tmp_path / "store")
    adds_up(outcome)
    slices = {study: len(v) for study, v in hospital.volumes.items()}
    assert reasons(outcome) == {
        ("images", "damaged"): slices["MRN1000", "ACC0"] + 1,  # a series is refused with all of its files; and the PNG
        ("images", "face"): slices["MRN2000", "ACC20"],
        ("images", "no_role"): slices["MRN2001", "ACC21"],
        ("images", "no_patient"): slices["MRN2002", "ACC22"],
        ("images", "unknown_format"): 1,
        ("images", "empty"): 1,
        ("texts", "no_patient"): 1,
        ("texts", "not_utf8"): 1,
        ("age", "not_a_number"): 1,
        ("sex", "not_in_vocabulary"): 1,
        ("seen", "not_a_date"): 1,
        ("born", "not_a_date"): 1,  # it is relative to `seen`
        ("nodule", "not_in_vocabulary"): 1,
        ("findings", "no_section"): 1,
        ("age", "contradiction"): 1,
        ("tables.visits", "no_patient"): 1,
        ("tables.visits", "empty_study"): 1,
    }
    assert len(StudyStore.open(str(tmp_path / "store"))) == 9


def test_a_bomb_costs_itself_and_no_more(hospital, tmp_path, write_dicom):
    import pydicom
    import pydicom.filereader
    import pydicom.uid

    paths = write_dicom(hospital.exports / "dicom/bomb", np.zeros((1, 4, 4), np.int16), np.eye(4), PatientID="B")
    for path in paths:  # a header that is true, and 4 GiB of zeros behind it
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        ds.save_as(path)
        whole = path.read_bytes()
        start = 144 + pydicom.filereader.read_file_meta_info(path).FileMetaInformationGroupLength
        head, body = whole[:start], zlib.decompress(whole[start:], -zlib.MAX_WBITS)
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        first = deflate.compress(body + struct.pack("<HH2sHI", 0x7FE1, 0x10, b"OB", 0, 2**32 - 2))
        first += deflate.flush(zlib.Z_FULL_FLUSH)
        again = deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH)
        path.write_bytes(head + first + again * 256 + deflate.flush(zlib.Z_FINISH))
        assert path.stat().st_size < 2**23
    outcome = hospital.ingest(tmp_path / "store")
    adds_up(outcome)
    assert reasons(outcome) == {("images", "out_of_memory"): 1}
    assert len(StudyStore.open(str(tmp_path / "store"))) == 6


def test_several_series_of_one_role(hospital, tmp_path, write_dicom):
    ids = {"PatientID": "MRN1000", "AccessionNumber": "ACC0"}
    larger = np.ones((9, 9, 9), np.int16)
    write_dicom(hospital.exports / "dicom/more", larger, np.diag([-1, -1, 1, 1.0]), **ids)
    first = hospital.ingest(tmp_path / "refused")
    adds_up(first)
    assert reasons(first) == {("images", "several_series"): 9 + len(hospital.volumes["MRN1000", "ACC0"])}
    ct = {"files": ["dicom/**"], "modality": "CT", "study_tag": "AccessionNumber", "several": "largest"}
    hospital.describe({"images": {"ct": ct}, "texts": {}})
    second = hospital.ingest(tmp_path / "largest")
    adds_up(second)
    assert reasons(second) == {("images", "another_series"): len(hospital.volumes["MRN1000", "ACC0"])}
    store = StudyStore.open(str(tmp_path / "largest"))
    assert (9, 9, 9) in {geometry(store, row)[0] for row in range(len(store))}


def test_when_nothing_can_be_taken_nothing_is_left(hospital, tmp_path):
    hospital.describe(
        {"images": {"ct": {"files": ["dicom/**"], "modality": "XA"}}, "texts": {}, "columns": {}, "labels": {}}
    )
    with pytest.raises(UserError, match=r"none of the inputs can be taken: \d+ were found, \d+ refused for .*no_role"):
        hospital.ingest(tmp_path / "out/store")
    hospital.describe(
        {"images": {"ct": {"files": ["nothing/**"]}}, "tables": {}, "texts": {}, "columns": {}, "labels": {}}
    )
    with pytest.raises(UserError, match="no file matches a pattern"):
        hospital.ingest(tmp_path / "out/store")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------- again and again


def test_a_second_run_changes_nothing_and_says_the_same(hospital, tmp_path, same_bytes):
    (hospital.exports / "dicom/readme.txt").write_text("x")
    first = hospital.ingest(tmp_path / "store")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")}
    second = hospital.ingest(tmp_path / "store")
    assert not second.built and (second.counts, second.rejects) == (first.counts, first.rejects)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")}
    hospital.ingest(tmp_path / "another")
    assert same_bytes(tmp_path / "store", tmp_path / "another")


def test_killed_anywhere_it_ends_in_the_same_bytes(hospital, tmp_path, same_bytes):
    hospital.ingest(tmp_path / "whole")
    command = [sys.executable, "-m", "mmfm_jax.cli", "ingest", str(hospital.described), "--workers", "2", "--out"]
    begun = time.monotonic()
    assert subprocess.run([*command, str(tmp_path / "timed")], stdout=-3, stderr=-3).returncode == 0
    seconds, rng = time.monotonic() - begun, np.random.default_rng()
    kills = 0
    for after in [*sorted(rng.uniform(0.3, 1, 4) * seconds), None]:
        with (tmp_path / "said").open("w") as said:
            run = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=-3, stderr=said)
        try:
            run.wait(timeout=after)
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            kills += 1
    assert run.returncode == 0 and kills, (tmp_path / "said").read_text()
    assert same_bytes(tmp_path / "whole", tmp_path / "killed")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hospital", "killed", "said", "timed", "whole"]


def test_new_patients_are_added_as_if_they_had_been_there_and_old_ones_keep_their_split(hospital, tmp_path, same_bytes):
    hospital.ingest(tmp_path / "grown")
    old = StudyStore.open(str(tmp_path / "grown"))
    splits = {p: s for s in old.counts for p in old.patients(old.rows(s))}
    for i in range(6, 9):
        hospital.admit(f"MRN{1000 + i}", f"ACC{i}", seed=i)
    hospital.ingest(tmp_path / "whole")
    with pytest.raises(UserError, match="--append"):
        hospital.ingest(tmp_path / "grown")
    for path in (hospital.exports / "dicom/MRN1000").rglob("*.dcm"):  # the pixels of what is there are not read again
        stat, whole = path.stat(), path.read_bytes()
        path.write_bytes(whole[:-8] + b"\x55" * 8)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    outcome = hospital.ingest(tmp_path / "grown", append=True)
    assert outcome.built and outcome.rejects == []
    assert same_bytes(tmp_path / "grown", tmp_path / "whole")
    new = StudyStore.open(str(tmp_path / "grown"))
    assert len(new) == 9
    assert {p: s for s in new.counts for p in new.patients(new.rows(s))}.items() >= splits.items()


def test_a_patient_of_the_store_cannot_change_its_split(hospital, tmp_path):
    hospital.describe({"split": {"column": "fold"}, "images": {}, "columns": {}})
    for row in hospital.rows:
        row["fold"] = "train"
    hospital.write_table()
    hospital.ingest(tmp_path / "store")
    for row in hospital.rows[:2]:
        row["fold"] = "test"
    hospital.write_table()
    with pytest.raises(UserError, match="0 would be lost and 1 change their split"):
        hospital.ingest(tmp_path / "store", append=True)
    StudyStore.open(str(tmp_path / "store")).verify()


def test_a_store_is_not_mixed_with_another(hospital, tmp_path):
    store = tmp_path / "store"
    hospital.ingest(store)
    (hospital.folder / "key.txt").write_text("another key, also long enough")
    with pytest.raises(UserError, match="another key"):
        hospital.ingest(store, append=True)
    (hospital.folder / "key.txt").write_text(KEY)
    hospital.describe({"labels": {}})
    with pytest.raises(UserError, match="another description"):
        hospital.ingest(store, append=True)
    hospital.describe({})
    lost = hospital.rows.pop()
    hospital.rows.pop()
    hospital.write_table()
    for path in [
        *hospital.exports.rglob(f"{lost['mrn']}_*"),
        *(hospital.exports / f"dicom/{lost['mrn']}").rglob("*.dcm"),
    ]:
        path.unlink()
    with pytest.raises(UserError, match="1 would be lost and 0 change their split"):
        hospital.ingest(store, append=True)
    StudyStore.open(str(store)).verify()
