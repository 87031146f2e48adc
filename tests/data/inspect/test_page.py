"""The page of a store shows what is counted in plain Python, tells of no one, and looks at no more than it must."""

import html
import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from mmfm_jax.data.inspect import page as inspect_page
from mmfm_jax.data.inspect.page import render, write_page
from mmfm_jax.data.inspect.survey import pictures, reject_counts, survey
from mmfm_jax.data.refuse import Refused, Reject, to_parquet
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, Schema, Study
from mmfm_jax.errors import UserError


def test_all_that_is_counted_is_what_the_studies_hold(store, studies, schema):
    found = survey(store)
    assert found.rows.tolist() == list(range(len(studies)))
    assert found.splits.tolist() == [s.split for s in studies]
    parts = {"image": "images", "text": "texts", "column": "row", "label": "labels"}
    for (kind, name), present in found.present.items():
        assert present.tolist() == [bool(getattr(s, parts[kind]).get(name) is not None) for s in studies], name
    assert len(found.present) == 3 + 2 + 2 + 1
    np.testing.assert_array_equal(found.numbers["age"], [s.row.get("age", np.nan) for s in studies])
    sexes = Counter(s.row["sex"] for s in studies if "sex" in s.row)
    assert found.categories["sex"] == sexes
    for name in schema.texts:
        assert found.words[name].tolist() == [len(t.split()) for s in studies for t in s.texts.get(name, ())]
    for role in schema.images:
        held = [s.images[role] for s in studies if role in s.images]
        assert found.shape[role].tolist() == [list(image.voxels.shape[:3]) for image in held]
        np.testing.assert_array_equal(found.spacing_mm[role], [image.spacing_mm for image in held])


def test_a_large_store_is_looked_at_in_evenly_spread_groups(tmp_path):
    schema = Schema(columns={"n": ColumnSpec(kind="number")}, texts={"note": ""})
    many = [Study(f"p{i}", "train", row={"n": float(i)}, texts={"note": (f"{'w ' * (i % 5)}.",)}) for i in range(1500)]
    write_store(str(tmp_path / "store"), schema, many)
    store = StudyStore.open(str(tmp_path / "store"))
    found = survey(store, groups=3)  # of six, the last of them of 220 studies
    assert found.rows.tolist() == [*range(256), *range(512, 768), *range(1280, 1500)]
    assert found.numbers["n"].tolist() == found.rows.tolist()
    assert found.words["note"].tolist() == [i % 5 + 1 for i in found.rows]
    assert "all studies were looked at" in render(store)


@pytest.fixture
def upright(tmp_path):
    """A volume whose voxels, in percent, tell where they are: 10 at the front, 1 more on the patient's right."""
    y, x = np.mgrid[:4, :6]
    voxels = np.zeros((3, 4, 6, 1), np.uint8)
    voxels[1, ..., 0] = 20 * (y == 3) + 10 * (x == 5)  # y grows to the front, x to the right
    schema = Schema(images={"ct": ImageSpec(dtype="uint8", shape=None), "cxr": ImageSpec(dtype="uint8", shape=None)})
    flat = voxels[1:2]
    study = Study("p", "train", images={"ct": Image(voxels, (2, 1, 1)), "cxr": Image(flat, (1, 1, 1))})
    write_store(str(tmp_path / "store"), schema, [study])
    return StudyStore.open(str(tmp_path / "store"))


def test_volumes_are_shown_front_up_and_patients_right_on_the_left(upright):
    (ct,), (cxr,) = (pictures(upright, np.array([0]), role) for role in ("ct", "cxr"))
    assert ct.pixels[0].mean() > 0.5 > ct.pixels[1:].mean()  # the front is the first row
    assert ct.pixels[1:, 0].min() > 0 and ct.pixels[1:, 1:].max() == 0  # the right is the first column
    assert cxr.pixels[-1].mean() > 0.5 and cxr.pixels[:-1, -1].min() > 0  # one slice: as stored


def test_large_slices_are_averaged_to_true_extent(tmp_path):
    rng = np.random.default_rng()
    voxels = rng.integers(0, 255, (1, 700, 500, 3)).astype(np.uint8)
    schema = Schema(images={"photo": ImageSpec(dtype="uint8", shape=None, channels=3)})
    write_store(str(tmp_path / "s"), schema, [Study("p", "train", images={"photo": Image(voxels, (1, 0.5, 0.25))})])
    store = StudyStore.open(str(tmp_path / "s"))
    (shown,) = pictures(store, np.array([0]), "photo")
    assert shown.pixels.shape[0] <= 192 and shown.pixels.shape[2] == 3
    np.testing.assert_allclose(shown.extent_mm, (350, 125), rtol=0.01)
    low, high = (store.stats.images["photo"].percentiles[p] for p in ("1", "99"))
    block = 700 // shown.pixels.shape[0], 500 // shown.pixels.shape[1]
    corner = voxels[0, : block[0], : block[1]].mean((0, 1))
    np.testing.assert_allclose(shown.pixels[0, 0], np.clip((corner - low) / (high - low), 0, 1), rtol=1e-5)


class Tags(HTMLParser):
    """Checks that tags nest; collects what the page refers to, and its headings."""

    def __init__(self):
        super().__init__()
        self.open, self.refers, self.headings, self.cells = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.refers += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_is_whole_in_itself_and_tells_of_no_one(store, studies):
    text = render(store)
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and tags.refers and all(r.startswith("data:image/svg+xml;base64,") for r in tags.refers)
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert tags.headings == [
        "Splits", "Labels by split", "Images", "Numbers", "Categories", "Texts", "What is missing",
    ]  # fmt: skip
    assert not any(s.patient in text for s in studies)
    assert "Seen" not in text and "Naïve" not in text and store.url not in text
    train = [s.labels["malignancy"] for s in studies if s.split == "train" and "malignancy" in s.labels]
    assert f"{sum(train):,} ({sum(train) / len(train):.0%})" in tags.cells
    assert render(store) == text


def test_a_store_of_labels_alone_and_one_without_values_have_no_empty_sections(tmp_path):
    schema = Schema(
        labels={"dead": LabelSpec(classes=("no", "yes"))},
        columns={"age": ColumnSpec(kind="number")},
        texts={"note": ""},
        images={"ct": ImageSpec(dtype="int16", shape=None)},
    )
    write_store(str(tmp_path / "store"), schema, [Study("p", "train", labels={"dead": 1}), Study("q", "test")])
    text = render(StudyStore.open(str(tmp_path / "store")))
    assert re.findall("<h2>(.*?)</h2>", text) == ["Splits", "Labels by split", "Images", "What is missing"]
    assert "nan" not in re.sub('base64,[^"]*', "", text)


def test_rejects_are_counted_by_reason(tmp_path):
    rng = np.random.default_rng()
    why = [Refused("face", "x"), Refused("bad_row", "y")]
    rejects = [
        Reject(f"images.{'ab'[rng.integers(2)]}", f"{i:016x}", 0, "", w.reason, f"detail {i}")
        for i, w in enumerate(why[rng.integers(2)] for _ in range(50))
    ]
    beside = {
        "rejects.parquet": to_parquet(rejects),
        "inputs.json": json.dumps({"images": {"inputs": 60, "taken": 10, "refused": 50}}).encode(),
    }
    write_store(str(tmp_path / "store"), Schema(texts={"t": ""}), [Study("p", "train")], beside=beside)
    store = StudyStore.open(str(tmp_path / "store"))
    expected = Counter((r.source, r.part, r.reason, r.mend) for r in rejects)
    counted = reject_counts(store)
    assert {one[:-1]: one[-1] for one in counted} == expected
    assert [n for *_, n in counted] == sorted(expected.values(), reverse=True)
    text = render(store)
    for (*_, mend), n in expected.items():
        assert html.escape(mend) in text and f">{n}</td>" in text
    assert "detail" not in text and rejects[0].file not in text


def test_the_page_lies_in_the_store_which_stays_whole_or_in_the_working_directory(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspect_page, "render", lambda store: f"{len(store)} studies")
    assert write_page(store, None) == tmp_path / "store/inspect.html"
    store.verify()
    assert write_page(store, tmp_path / "mine.html").read_text() == f"{len(store)} studies"
    monkeypatch.setattr(inspect_page.os, "access", lambda *_: False)  # tests may run as root
    assert write_page(store, None).resolve() == tmp_path / "inspect.html"
    with pytest.raises(UserError, match=r"nowhere/x.html: cannot be written: .*--out"):
        write_page(store, tmp_path / "nowhere/x.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inspect.html", "mine.html", "store"]
