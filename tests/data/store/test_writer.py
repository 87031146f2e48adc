"""A store is whole or not there, and holds nothing that its schema does not declare."""

import filecmp
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from mmfm_jax.data.store.format import open_kvstore
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import Image, ImageSpec, Schema, Study
from mmfm_jax.errors import UserError


def test_the_same_studies_make_the_same_bytes(tmp_path, schema, studies):
    for name in ("a", "b"):
        write_store(str(tmp_path / name), schema, studies)
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) > 20
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files[0], shallow=False)[1:] == ([], [])


def test_counts_by_split(store, studies):
    for split, counts in store.counts.items():
        held = [s for s in studies if s.split == split]
        assert counts.studies == len(held)
        assert counts.patients == len({s.patient for s in held})
        assert counts.images["ct"] == sum("ct" in s.images for s in held)
        assert counts.texts["report"] == sum("report" in s.texts for s in held)
        assert counts.masks.get("organs", 0) == sum("organs" in s.masks for s in held)
        assert counts.labels["malignancy"]["malignant"] == sum(s.labels.get("malignancy") == 1 for s in held)


# ---------------------------------------------------------------- never half a store


def broken_off(studies):
    yield from studies[:30]
    raise KeyboardInterrupt


def test_an_interrupted_build_leaves_nothing(tmp_path, schema, studies):
    with pytest.raises(KeyboardInterrupt):
        write_store(str(tmp_path / "store"), schema, broken_off(studies))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_store_and_the_next_one_works(tmp_path, schema, studies, assert_holds):
    script = """
import sys
import numpy as np
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import Image, ImageSpec, Schema, Study
image = Image(np.ones((8, 8, 8, 1), np.uint8), (1.0, 1.0, 1.0))
studies = (Study(f"p{i}", "train", {"ct": image}) for i in range(10**9))
write_store(sys.argv[1], Schema(images={"ct": ImageSpec(dtype="uint8", shape=None)}), studies)
"""
    build = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "store")])
    partial = tmp_path / ".store.partial/volumes/ct/00000009/zarr.json"
    while build.poll() is None and not partial.exists():
        time.sleep(0.01)
    os.kill(build.pid, signal.SIGKILL)
    assert build.wait() == -signal.SIGKILL and partial.exists()
    with pytest.raises(UserError, match="no store here"):
        StudyStore.open(str(tmp_path / "store"))
    write_store(str(tmp_path / "store"), schema, studies)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert_holds(StudyStore.open(str(tmp_path / "store")), studies)


def test_an_interrupted_build_in_a_bucket_is_no_store_and_is_cleared_by_the_next(schema, studies, assert_holds):
    url, whole = (f"memory://stores/{uuid.uuid4()}" for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        write_store(url, schema, broken_off(studies))
    with pytest.raises(UserError, match="no store here"):
        StudyStore.open(url)
    for each in (url, whole):
        write_store(each, schema, studies[:3])
    assert_holds(StudyStore.open(url), studies[:3])
    assert sorted(open_kvstore(url).list().result()) == sorted(open_kvstore(whole).list().result())


def test_what_is_already_there_is_left_alone(tmp_path, schema, store, studies):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for url in (store.url, str(tmp_path / "mine"), str(tmp_path / "file")):
        with pytest.raises(UserError, match="already exists"):
            write_store(url, schema, studies)
    assert (tmp_path / "mine/thesis.tex").exists() and (tmp_path / "file").exists()
    store.verify()


def test_what_is_already_in_a_bucket_is_left_alone(schema, studies):
    url = f"memory://stores/{uuid.uuid4()}"
    bucket = open_kvstore(url)
    bucket.write("volumes/mine.nii.gz", b"x").result()
    with pytest.raises(UserError, match="already holds volumes/ that is of no store"):
        write_store(url, schema, studies)
    assert bucket.list().result() == [b"volumes/mine.nii.gz"]
    other = f"{url}/store"
    write_store(other, schema, studies[:2])
    with pytest.raises(UserError, match="already holds a store"):
        write_store(other, schema, studies[:2])


def test_a_place_that_cannot_be_written(tmp_path, schema, studies):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/store: cannot be written: "):
        write_store(str(tmp_path / "file/store"), schema, studies)


# ---------------------------------------------------------------- refused


MASK = np.ones((6, 5, 4), np.uint8)
ONE = Image(np.ones((6, 5, 4, 1), np.uint8), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (Study("p", "train", images={"mri": ONE}), "mri is not among the images"),
        (Study("p", "train", texts={"letter": ("x",)}), "letter is not among the texts"),
        (Study("p", "train", row={"name": 3.0}), "name is not among the columns"),
        (Study("p", "train", row={"sex": "unknown"}), "outside its vocabulary"),
        (Study("p", "train", row={"age": float("nan")}), "not a finite number"),
        (Study("p", "train", labels={"malignancy": 2}), "outside its 2 classes"),
        (Study("p", "train", images={"nodule": Image(ONE.voxels.astype(np.int16), ONE.spacing_mm)}), "is int16"),
        (Study("p", "train", images={"nodule": Image(ONE.voxels[1:], ONE.spacing_mm)}), "has shape"),
        (Study("p", "train", images={"nodule": Image(ONE.voxels, (1.0, 0.0, 1.0))}), "spacing"),
        (Study("patient0", "test"), "a patient belongs to one"),
        (Study("p", "train", masks={"bones": MASK}), "bones is not among the masks"),
        (Study("p", "train", masks={"parts": MASK}), "mask parts is of image nodule, which is not there"),
        (
            Study("p", "train", {"nodule": ONE}, masks={"parts": MASK[1:]}),
            "make it uint8 of \\(6, 5, 4\\), as",
        ),
        (Study("p", "train", {"nodule": ONE}, masks={"parts": MASK.astype(np.int16)}), "is int16 of shape"),
        (Study("p", "train", {"nodule": ONE}, masks={"parts": MASK * 3}), "holds the value 3 and has 2 classes"),
    ],
)
def test_a_study_that_does_not_fit_is_refused_and_nothing_is_left(tmp_path, schema, studies, study, message):
    with pytest.raises(UserError, match=message):
        write_store(str(tmp_path / "store"), schema, [*studies[:2], study])
    assert list(tmp_path.iterdir()) == []


def test_no_studies_make_no_store(tmp_path, schema):
    with pytest.raises(UserError, match="no studies"):
        write_store(str(tmp_path / "store"), schema, [])
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_no_number_are_refused(tmp_path, value):
    schema = Schema(images={"ct": ImageSpec(dtype="float32", shape=None)})
    voxels = np.zeros((3, 4, 5, 1), np.float32)
    voxels[2, 1, 3] = value
    with pytest.raises(UserError, match="study 0: image ct has voxels that are no finite numbers; leave the image out"):
        write_store(str(tmp_path / "store"), schema, [Study("p", "train", {"ct": Image(voxels, (1.0, 1.0, 1.0))})])
    assert list(tmp_path.iterdir()) == []
