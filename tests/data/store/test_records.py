"""A study's row is read alone: no other study, no other column, never another's values; older stores give the same."""

import json
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.data.split import share_of
from mmfm_jax.data.store import record_files, rows, writer
from mmfm_jax.data.store.bounded import BytesCache
from mmfm_jax.data.store.masks import summarise
from mmfm_jax.data.store.records import RecordLayout, is_whole
from mmfm_jax.data.store.study_store import StudyStore, Wanted
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Schema, Study
from mmfm_jax.errors import UserError

COLUMNS = (
    "image/nodule/spacing_mm", "image/photo/spacing_mm", "image/ct/spacing_mm", "image/ct/shape", "text/report",
    "text/history", "column/age", "column/sex", "label/malignancy", "mask/parts/voxels", "mask/organs/voxels",
    "mask/lesions/voxels",
)  # fmt: skip


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """(start, end) of each ranged read of records and of their index."""
    made, read = [], record_files.StudyRecords._read
    monkeypatch.setattr(
        record_files.StudyRecords,
        "_read",
        lambda self, part, start, end: (made.append((start, end)), read(self, part, start, end))[1],
    )
    return made


def older(store: StudyStore, folder: Path) -> StudyStore:
    """The store as version 2 wrote it."""
    shutil.copytree(store.url, folder)
    shutil.rmtree(folder / "rows")
    for part in (folder / "index.parquet").iterdir():
        pq.write_table(pq.read_table(part).drop_columns(["share"]), part, compression="zstd")
    file = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(file | {"format_version": 2}))
    return StudyStore.open(str(folder), store.train_share)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32), present=st.sampled_from([0.0, 0.5, 1.0]), names=st.sets(st.sampled_from(COLUMNS)),
    number=st.integers(0, 2**63),
)  # fmt: skip
def test_some_columns_of_a_record_are_those_of_the_row(schema, make_studies, seed, present, names, number):
    (study,) = make_studies(1, seed, present)
    masks = {name: summarise(mask, len(schema.masks[name].classes)) for name, mask in study.masks.items()}
    row = rows.encode(study, schema, {"ct": "0" * 64} if "ct" in study.images else {}, masks)
    layout = RecordLayout(schema)
    record = layout.pack(number, row)
    held = layout.decoder(tuple(names))(record)
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in held.items()} == {n: row.get(n) for n in names}
    assert is_whole(number, record) and not is_whole(number + 1, record)


def test_any_text_comes_back(tmp_path):
    """What JSON has a sign of its own for, what is not of Latin, and what is empty."""
    texts = [('"', "\\", "\n\t\0"), ("ł 肺 🫁",), ("",), (" " * 9, "]", "[")]
    schema = Schema(texts={"note": "", "other": ""})
    studies = [Study(f"p{i}", "train", texts={"note": held}) for i, held in enumerate(texts)]
    write_store(str(tmp_path / "store"), schema, studies)
    store = StudyStore.open(str(tmp_path / "store"))
    assert [store.table(row)[0] for row in range(4)] == [{"note": t} for t in texts]


def test_only_what_is_wanted_is_given(store, studies):
    wanted = Wanted(frozenset({"history"}), frozenset({"age"}), frozenset())
    for row, study in enumerate(studies):
        texts = {name: t for name, t in study.texts.items() if name == "history"}
        assert store.table(row, wanted) == (texts, {n: v for n, v in study.row.items() if n == "age"}, {})


def test_a_study_is_read_without_its_neighbours(store, reads):
    held = (Path(store.url) / "rows/00000.rows").stat().st_size
    index = 8 * (len(store) + 2)
    store.table(20)
    store.volume_info("ct", 20)
    store.mask_voxels("organs", 20)
    assert reads[0] == (0, index) and len(reads) == 2
    start, end = reads[1]
    assert end - start < 2 * (held - index) / len(store)
    store.table(7)
    assert len(reads) == 3


def test_studies_in_order_are_read_together(store, studies, reads):
    assert [store.table(row)[0] for row in range(40)] == [study.texts for study in studies]
    assert len(reads) == 3  # the index, the first, and from the second on it is seen that they come in order


def test_parts_and_blocks_that_split_the_studies_change_nothing(tmp_path, schema, studies, monkeypatch):
    for module in (record_files, rows, writer):
        monkeypatch.setattr(module, "PART_STUDIES", 12)
    monkeypatch.setattr(record_files, "BLOCK_STUDIES", 4)
    write_store(str(tmp_path / "store"), schema, studies)
    store = StudyStore.open(str(tmp_path / "store"))
    for row in [*np.random.default_rng(0).permutation(40).tolist(), *range(40)]:
        assert store.table(row) == (studies[row].texts, studies[row].row, studies[row].labels)


def test_damage_anywhere_is_an_error_and_never_other_values(store, studies):
    """Each byte in turn with a flipped bit, and the file cut off there: a study is what it was, or an error."""
    path = Path(store.url) / "rows/00000.rows"
    whole, rng, errors = path.read_bytes(), np.random.default_rng(0), 0
    for at in rng.choice(len(whole), 300, replace=False).tolist():
        flipped = bytes([whole[at] ^ 1 << int(rng.integers(8))])
        for data in (whole[:at] + flipped + whole[at + 1 :], whole[:at]):
            path.write_bytes(data)
            damaged = pickle.loads(pickle.dumps(store))
            found = 0
            for row in rng.choice(40, 40, replace=False).tolist():
                try:
                    assert damaged.table(row) == (studies[row].texts, studies[row].row, studies[row].labels)
                except UserError as error:
                    assert "rows/00000.rows: " in str(error)
                    found += 1
            assert found
            errors += found
    assert errors > 600


def test_a_record_in_the_place_of_another_is_an_error(store):
    """With an index that says so and a checksum that is right."""
    path, count = Path(store.url) / "rows/00000.rows", len(store) + 1
    data = path.read_bytes()
    starts = np.frombuffer(data[: 8 * count], "<u8").copy()
    records = [data[a:b] for a, b in pairwise(starts)]
    records[3], records[4] = records[4], records[3]
    starts[4] = starts[3] + len(records[3])
    path.write_bytes(starts.tobytes() + crc32(starts.tobytes()).to_bytes(8, "little") + b"".join(records))
    assert store.table(5)
    for row in (3, 4):
        with pytest.raises(UserError, match=f"the record of study {row} is damaged"):
            store.table(row)


def test_a_store_of_version_2_gives_the_same(store, studies, assert_holds, tmp_path):
    before = older(store, tmp_path / "older")
    assert_holds(before, studies)
    wanted = Wanted(labels=frozenset({"malignancy"}))
    for row in range(len(store)):
        assert before.table(row, wanted) == store.table(row, wanted)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_a_share_is_the_same_whether_it_was_stored_or_not(store, studies, tmp_path, share):
    stored = StudyStore.open(store.url, share)
    computed = older(stored, tmp_path / "older")
    expected = [i for i, s in enumerate(studies) if s.split == "train" and share_of(s.patient) < share * 2**32]
    assert stored.rows("train").tolist() == computed.rows("train").tolist() == expected


def test_the_index_is_read_from_the_first_wanted_column_on(tmp_path, monkeypatch):
    """In a part larger than what is read at first."""
    many = [Study(f"{i:032x}", ("train", "test")[i % 2]) for i in range(30_000)]
    write_store(str(tmp_path / "store"), Schema(columns={"n": ColumnSpec(kind="number")}), many)
    assert (tmp_path / "store/index.parquet/00000.parquet").stat().st_size > 3 * 2**15
    monkeypatch.setattr(rows, "_TAIL_BYTES", 2**15)
    whole = []
    read: Callable = rows.StudyTables._read
    monkeypatch.setattr(
        rows.StudyTables, "_read", lambda self, name, of: (whole.append(of.start), read(self, name, of))[1]
    )
    store = StudyStore.open(str(tmp_path / "store"))
    assert store.rows("test").tolist() == list(range(1, 30_000, 2)) and not whole
    kept = StudyStore.open(store.url, 0.25).rows("train")
    assert kept.tolist() == [i for i in range(0, 30_000, 2) if share_of(many[i].patient) < 0.25 * 2**32]
    assert len(whole) == 1 and whole[0] > 0
    assert store.patients(kept).tolist() == [many[i].patient for i in kept]
    assert store.shares(kept).tolist() == [share_of(many[i].patient) for i in kept]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=60), st.integers(1, 60))
def test_a_cache_holds_what_was_used_last_within_its_bytes(steps, limit):
    cache, used = BytesCache(limit, len), {}
    for key, size in steps:
        value = cache.made(key, lambda size=size: bytes(size))
        if value is not used.get(key):  # made anew
            used[key] = value
        used[key] = used.pop(key)
        held, room = [], limit
        for name, last in reversed(used.items()):
            if len(last) <= limit:
                if (room := room - len(last)) < 0:
                    break
                held.append(name)
        assert {name for name in range(10) if name in cache} == set(held)
        assert cache.bytes == sum(len(used[name]) for name in held) <= limit
        used = {name: value for name, value in used.items() if name in held or len(value) > limit}
