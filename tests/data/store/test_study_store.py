"""A store gives back what was written, reads no more than it needs, and says plainly what is wrong with it."""

import dataclasses
import json
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfm_jax.data.split import share_of
from mmfm_jax.data.store import format as store_format
from mmfm_jax.data.store import record_files
from mmfm_jax.data.store import rows as store_rows
from mmfm_jax.data.store import writer as store_writer
from mmfm_jax.data.store.format import context
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import Image, ImageSpec, MaskSpec, Schema, Study
from mmfm_jax.errors import UserError


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 12), present=st.sampled_from([0.0, 0.5, 1.0]))
def test_gives_back_what_was_written_at_any_url(schema, make_studies, assert_holds, seed, n, present):
    url = f"memory://stores/{uuid.uuid4()}"
    studies = make_studies(n, seed, present)
    write_store(url, schema, iter(studies))
    store = StudyStore.open(url)
    assert store.schema == schema
    assert_holds(store, studies)
    store.verify()


def test_shards_parts_and_groups_that_split_the_studies_change_nothing(
    tmp_path, schema, studies, assert_holds, monkeypatch
):
    for module in (store_rows, store_writer, record_files):
        monkeypatch.setattr(module, "PART_STUDIES", 12)
    for module in (store_rows, store_writer):
        monkeypatch.setattr(module, "GROUP_STUDIES", 5)
    monkeypatch.setattr(record_files, "BLOCK_STUDIES", 4)
    monkeypatch.setattr("mmfm_jax.data.store.study_store.PART_STUDIES", 12)
    monkeypatch.setattr(store_format, "SHARD_BYTES", 7 * 6 * 5 * 4)
    url = f"file://{tmp_path}/store"
    write_store(url, schema, studies)
    store = StudyStore.open(url)
    assert len(list((tmp_path / "store/volumes/nodule/0/c").iterdir())) == 6
    for table in ("studies.parquet", "index.parquet", "rows"):
        assert len(list((tmp_path / "store" / table).iterdir())) == 4
    assert_holds(store, studies)
    rows = np.array([39, 0, 13, 12, 11])
    assert store.patients(rows).tolist() == [studies[r].patient for r in rows]
    assert store.shares(rows).tolist() == [share_of(studies[r].patient) for r in rows]
    store.verify()


def test_many_threads_read_the_same(store, studies):
    def read(row):
        image = studies[row].images.get("ct")
        same = image is None or np.array_equal(store.crop("ct", row, (0, 0, 0), image.voxels.shape[:3]), image.voxels)
        return same and store.table(row)[0] == studies[row].texts

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, list(range(40)) * 4))
    assert len(pickle.loads(pickle.dumps(store))) == 40


@given(start=st.tuples(*[st.integers(-9, 80)] * 3), size=st.tuples(*[st.integers(1, 40)] * 3))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_crop_is_the_box_of_the_padded_volume(store, studies, start, size):
    row = next(i for i, s in enumerate(studies) if "ct" in s.images)
    voxels = studies[row].images["ct"].voxels
    padded = np.pad(voxels, [(10, 130)] * 3 + [(0, 0)], constant_values=-1024)
    box = tuple(slice(a + 10, a + 10 + n) for a, n in zip(start, size))
    np.testing.assert_array_equal(store.crop("ct", row, start, size, fill=-1024), padded[box])


@given(start=st.tuples(*[st.integers(-9, 70)] * 3), size=st.tuples(*[st.integers(1, 40)] * 3))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_crop_of_a_mask_lies_on_that_of_its_image(store, studies, start, size):
    """Each mask is of its image's voxels, as is a mask of where they are even; out of the image it is background."""
    for name, spec in store.schema.masks.items():
        row = next(i for i, s in enumerate(studies) if name in s.masks)
        box = np.pad(studies[row].masks[name], [(10, 130)] * 3)
        at = tuple(slice(a + 10, a + 10 + n) for a, n in zip(start, size))
        crop = store.mask_crop(name, row, start, size)
        np.testing.assert_array_equal(crop, box[at])
        assert crop.shape == store.crop(spec.image, row, start, size).shape[:3] and crop.dtype == np.uint8


def test_a_mask_that_a_study_lacks(store, studies):
    row = next(i for i, s in enumerate(studies) if "organs" not in s.masks)
    with pytest.raises(UserError, match=f"study {row} has no mask organs"):
        store.mask_crop("organs", row, (0, 0, 0), (1, 1, 1))


def test_rows_and_texts_are_in_store_order(store, schema, studies):
    train, test = store.rows("train"), store.rows("test")
    assert train.dtype == np.int64
    for split, rows in (("train", train), ("test", test)):
        assert rows.tolist() == [i for i, study in enumerate(studies) if study.split == split]
    assert not set(store.patients(train)) & set(store.patients(test))
    expected = [text for row in train for field in schema.texts for text in studies[row].texts.get(field, ())]
    assert list(store.texts(train)) == expected


def test_a_share_of_the_training_patients_is_all_of_each_and_nested_and_leaves_other_splits(store, studies):
    shares = [StudyStore.open(store.url, share) for share in (0.3, 0.7, 1.0)]
    rows = [set(shared.rows("train").tolist()) for shared in shares]
    assert rows[0] < rows[1] < rows[2] == set(store.rows("train").tolist())
    for chosen in rows:
        patients = {studies[row].patient for row in chosen}
        assert chosen == {i for i, study in enumerate(studies) if study.split == "train" and study.patient in patients}
    assert all(shared.rows("test").tolist() == store.rows("test").tolist() for shared in shares)
    assert pickle.loads(pickle.dumps(shares[0])).rows("train").tolist() == sorted(rows[0])
    with pytest.raises(UserError, match=r"data\.train_share: 0\.0001 leaves none of the \d+ training patients"):
        StudyStore.open(store.url, 1e-4).rows("train")


# ---------------------------------------------------------------- reads little, holds little


def write_volumes(url: str, volumes: list[np.ndarray]) -> None:
    schema = Schema(images={"ct": ImageSpec(dtype="uint8", shape=None)})
    write_store(url, schema, [Study("p", "train", {"ct": Image(v[..., None], (1.0, 1.0, 1.0))}) for v in volumes])


def metric(name: str) -> int:
    found = ts.experimental_collect_matching_metrics(f"/tensorstore/{name}")
    return sum(value["value"] for each in found for value in each["values"])


def test_a_crop_reads_only_the_chunks_it_touches(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 128), np.uint8)  # which cannot be compressed
    write_volumes(str(tmp_path / "store"), [noise])
    store = StudyStore.open(str(tmp_path / "store"))
    store.volume_info("ct", 0)
    before = metric("kvstore/file/bytes_read")
    store.crop("ct", 0, (33, 33, 33), (31, 31, 31))
    assert 32**3 <= metric("kvstore/file/bytes_read") - before < 2 * 32**3  # of 64 chunks of 32^3, one


def test_a_crop_and_positions_of_a_mask_read_only_the_chunks_they_touch(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (128, 128, 128), np.uint8)
    mask = rng.integers(0, 256, noise.shape, np.uint8) % 255  # which cannot be compressed either
    names = tuple(f"structure {i}" for i in range(254))
    schema = Schema(
        images={"ct": ImageSpec(dtype="uint8", shape=None)}, masks={"parts": MaskSpec(image="ct", classes=names)}
    )
    study = Study("p", "train", {"ct": Image(noise[..., None], (1.0, 1.0, 1.0))}, masks={"parts": mask})
    write_store(str(tmp_path / "store"), schema, [study])
    store = StudyStore.open(str(tmp_path / "store"))
    store.mask_voxels("parts", 0)
    before = metric("kvstore/file/bytes_read")
    np.testing.assert_array_equal(store.mask_crop("parts", 0, (33, 33, 33), (31, 31, 31)), mask[33:64, 33:64, 33:64])
    assert 32**3 <= metric("kvstore/file/bytes_read") - before < 2 * 32**3
    before = metric("kvstore/file/bytes_read")
    assert len(store.mask_positions("parts", 0, 100)) == 1000
    assert metric("kvstore/file/bytes_read") - before < 32 * 1024  # of 3 MB: one class, and the index


def test_chunks_are_kept_up_to_a_bound(tmp_path):
    def kept() -> int:
        return metric("cache/miss_count") - metric("cache/evict_count")

    volumes, size = 12, 2 * 2**20  # of 1 MiB
    write_volumes(str(tmp_path / "store"), [np.full((64, 128, 128), i, np.uint8) for i in range(volumes)])
    store = StudyStore.open(str(tmp_path / "store"), cache_bytes=size)
    before = kept()
    for row in range(volumes):
        store.crop("ct", row, (0, 0, 0), (64, 128, 128))
    assert 0 < kept() - before <= size / 32**3 + 2 * volumes  # chunks of 32^3, and of each volume metadata and an index
    same = pickle.loads(pickle.dumps(store))
    assert same.cache_bytes == size and context(size) is context(size) is not context()


# ---------------------------------------------------------------- readable without us


def test_other_readers_of_zarr_and_parquet_find_everything(store, studies):
    folder = Path(store.url)
    table = pq.read_table(folder / "studies.parquet")
    assert table.column("patient").to_pylist() == [s.patient for s in studies]
    texts = [list(s.texts["report"]) if "report" in s.texts else None for s in studies]
    assert table.column("text/report").to_pylist() == texts
    stacked = ts.open({"driver": "zarr3", "kvstore": f"file://{folder}/volumes/photo/0/"}).result()
    for row, study in enumerate(studies):
        if "photo" in study.images:
            for channel in range(3):
                voxels = stacked[3 * row + channel].read().result()
                np.testing.assert_array_equal(voxels, study.images["photo"].voxels[..., channel])
        if "ct" in study.images:
            own = ts.open({"driver": "zarr3", "kvstore": f"file://{folder}/volumes/ct/{row:08d}/0/"}).result()
            np.testing.assert_array_equal(own.read().result()[0], study.images["ct"].voxels[..., 0])


# ---------------------------------------------------------------- what is wrong with it


def test_a_missing_store(tmp_path):
    with pytest.raises(UserError, match="there is no store here"):
        StudyStore.open(str(tmp_path / "nowhere"))


def test_a_url_of_no_known_kind():
    with pytest.raises(UserError, match="carrier-pigeon://coop: not a folder or a URL"):
        StudyStore.open("carrier-pigeon://coop")


def test_a_newer_format(store):
    path = Path(store.url) / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 4, "unheard_of": []}))
    with pytest.raises(UserError, match="has format version 4 and this release reads up to 3; upgrade"):
        StudyStore.open(store.url)


def test_a_store_of_version_1_is_read(tmp_path, schema, make_studies):
    """As they were before there were masks: no word of them anywhere."""
    plain, studies = schema.model_copy(update={"masks": {}}), make_studies(6)
    studies = [dataclasses.replace(study, masks={}) for study in studies]
    write_store(str(tmp_path / "store"), plain, studies)
    file = json.loads((tmp_path / "store/store.json").read_text()) | {"format_version": 1}
    stats = json.loads((tmp_path / "store/stats.json").read_text())
    del file["schema"]["masks"], stats["masks"]
    for counts in file["counts"].values():
        del counts["masks"]
    assert "mask" not in json.dumps([file, stats])
    (tmp_path / "store/stats.json").write_text(json.dumps(stats))
    (tmp_path / "store/store.json").write_text(json.dumps(file))
    store = StudyStore.open(str(tmp_path / "store"))
    assert [store.table(row) for row in range(6)] == [(s.texts, s.row, s.labels) for s in studies]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": "x"}', "\udcff"])
def test_a_corrupt_description(store, text):
    (Path(store.url) / "store.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"store\.json: is not a valid store description"):
        StudyStore.open(store.url)


def test_a_split_without_patients_names_those_there_are(store):
    with pytest.raises(
        UserError, match=r"validation has no patients; the store has the splits test \(6\), train \(14\)"
    ):
        store.rows("validation")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[: len(data) // 2])
    else:
        at = len(data) // 3
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize("how", ["missing", "short", "flipped"])
@pytest.mark.parametrize("name", ["parts", "organs"])
def test_a_damaged_mask_or_its_positions_is_an_error_too(store, studies, name, how):
    row = next(i for i, study in enumerate(studies) if name in study.masks and study.masks[name].any())
    image, shape = store.schema.masks[name].image, studies[row].masks[name].shape
    key = image if name == "parts" else f"{image}/{row:08d}"
    damage(next(p for p in Path(store.url).glob(f"volumes/{key}/labels/{name}/0/c/**/0") if p.is_file()), how)
    with pytest.raises(UserError, match=f"volumes/{key}/labels/{name}/0: a chunk .* is missing, cut short or corrupt"):
        store.mask_crop(name, row, (0, 0, 0), shape)
    with pytest.raises(UserError, match=f"volumes/{key}"):
        store.verify()
    shard = Path(store.url) / f"positions/{name}/c/0/0/0"
    damage(shard, how)
    if how == "flipped":  # in every chunk, for those of studies without the mask are never read
        half = shard.stat().st_size // 2
        shard.write_bytes(bytes(b ^ 1 for b in shard.read_bytes()[:half]) + shard.read_bytes()[half:])
    with pytest.raises(UserError, match=f"positions/{name}: a chunk .* is missing, cut short or corrupt"):
        for row in range(len(store)):
            for index in range(len(store.schema.masks[name].classes)):
                store.mask_positions(name, row, index)


@pytest.mark.parametrize("how", ["missing", "short", "flipped"])
@pytest.mark.parametrize("role", ["nodule", "ct"])
def test_a_damaged_chunk_is_an_error_and_never_wrong_voxels(store, studies, role, how):
    rows = [i for i, study in enumerate(studies) if role in study.images]
    key = "0" if role == "nodule" else f"{rows[0]:08d}/0"
    damage(next(p for p in (Path(store.url) / f"volumes/{role}/{key}/c").rglob("*") if p.is_file()), how)
    with pytest.raises(UserError, match=f"volumes/{role}/{key}: a chunk .* is missing, cut short or corrupt"):
        for row in rows:
            voxels = studies[row].images[role].voxels
            np.testing.assert_array_equal(store.crop(role, row, (0, 0, 0), voxels.shape[:3]), voxels)
    with pytest.raises(UserError, match=f"volumes/{role}"):
        store.verify()


@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_damaged_table_names_its_file(store, how):
    for name in ("rows/00000.rows", "studies.parquet/00000.parquet", "index.parquet/00000.parquet"):
        damage(Path(store.url) / name, how)
    with pytest.raises(UserError, match=r"rows/00000\.rows: .* (missing|cut off)"):
        store.table(len(store) - 1)
    with pytest.raises(UserError, match=r"studies\.parquet/00000\.parquet: is "):
        list(store.row_groups(1))
    with pytest.raises(UserError, match=r"index\.parquet/00000\.parquet: is "):
        store.rows("train")


@pytest.mark.parametrize(
    "name", ["stats.json", "studies.parquet/00000.parquet", "rows/00000.rows", "volumes/photo/zarr.json"]
)
def test_verify_names_the_file_with_a_flipped_bit(store, name):
    store.verify()
    damage(Path(store.url) / name, "flipped")
    with pytest.raises(UserError, match=f"{name}: is not what was written"):
        store.verify()
