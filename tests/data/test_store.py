"""A store gives back what was written, reads no more than it needs, and says plainly what is wrong with it."""

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

from mmfm_jax.data import format as store_format
from mmfm_jax.data import rows as store_rows
from mmfm_jax.data import writer as store_writer
from mmfm_jax.data.store import StudyStore, write_store
from mmfm_jax.data.study import Image, ImageSpec, Schema, Study
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
    for module in (store_rows, store_writer):
        monkeypatch.setattr(module, "PART_STUDIES", 12)
        monkeypatch.setattr(module, "GROUP_STUDIES", 5)
    monkeypatch.setattr("mmfm_jax.data.store.PART_STUDIES", 12)
    monkeypatch.setattr(store_format, "SHARD_BYTES", 7 * 6 * 5 * 4)
    url = f"file://{tmp_path}/store"
    write_store(url, schema, studies)
    store = StudyStore.open(url)
    assert len(list((tmp_path / "store/volumes/nodule/0/c").iterdir())) == 6
    assert len(list((tmp_path / "store/studies.parquet").iterdir())) == 4
    assert_holds(store, studies)
    rows = np.array([39, 0, 13, 12, 11])
    assert store.patients(rows).tolist() == [studies[r].patient for r in rows]
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


def test_rows_and_texts_are_in_store_order(store, schema, studies):
    train, test = store.rows("train"), store.rows("test")
    assert train.dtype == np.int64
    for split, rows in (("train", train), ("test", test)):
        assert rows.tolist() == [i for i, study in enumerate(studies) if study.split == split]
    assert not set(store.patients(train)) & set(store.patients(test))
    expected = [text for row in train for field in schema.texts for text in studies[row].texts.get(field, ())]
    assert list(store.texts(train)) == expected


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


def test_chunks_are_kept_up_to_a_bound(tmp_path):
    def kept() -> int:
        return metric("cache/miss_count") - metric("cache/evict_count")

    volumes = 12  # of 16 MiB, more than the cache of 128 MiB
    write_volumes(str(tmp_path / "store"), [np.full((256, 256, 256), i, np.uint8) for i in range(volumes)])
    store = StudyStore.open(str(tmp_path / "store"))
    before = kept()
    for row in range(volumes):
        store.crop("ct", row, (0, 0, 0), (256, 256, 256))
    assert kept() - before <= 128 * 2**20 / 32**3  # chunks of 32^3


def test_row_groups_are_kept_up_to_a_bound(tmp_path, schema, studies, monkeypatch):
    for module in (store_rows, store_writer):
        monkeypatch.setattr(module, "GROUP_STUDIES", 4)
    monkeypatch.setattr(store_rows, "_CACHED_GROUPS", 3)
    write_store(str(tmp_path / "store"), schema, studies)
    store = StudyStore.open(str(tmp_path / "store"))
    for row in [*range(40), 0]:
        assert store.table(row)[0] == studies[row].texts
    held = store._rows._group.cache_info()
    assert (held.currsize, held.misses) == (3, 11)  # 10 groups, and the first once more


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
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2, "unheard_of": []}))
    with pytest.raises(UserError, match="has format version 2 and this release reads up to 1; upgrade"):
        StudyStore.open(store.url)


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
    damage(Path(store.url) / "studies.parquet/00000.parquet", how)
    damage(Path(store.url) / "index.parquet/00000.parquet", how)
    with pytest.raises(UserError, match=r"studies\.parquet/00000\.parquet: is "):
        store.table(0)
    with pytest.raises(UserError, match=r"index\.parquet/00000\.parquet: is "):
        store.rows("train")


@pytest.mark.parametrize("name", ["stats.json", "studies.parquet/00000.parquet", "volumes/photo/zarr.json"])
def test_verify_names_the_file_with_a_flipped_bit(store, name):
    store.verify()
    damage(Path(store.url) / name, "flipped")
    with pytest.raises(UserError, match=f"{name}: is not what was written"):
        store.verify()
