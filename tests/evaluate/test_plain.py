"""What baselines are given of a store made here."""

import numpy as np
import pytest

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.split import share_of
from mmfm_jax.data.store.study_store import DamagedImage, StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, Schema, Study
from mmfm_jax.evaluate import plain
from mmfm_jax.evaluate.plain import drawn_rows, middle_size, read_plain
from mmfm_jax.experiment import validate
from mmfm_jax.metrics.held_out import Split
from mmfm_jax.metrics.image_numbers import INTENSITY, SHAPE, intensity_numbers, shape_numbers

SCHEMA = Schema(
    images={"ct": ImageSpec(dtype="int16", shape=None), "outline": ImageSpec(dtype="uint8", shape=(6, 6, 6))},
    texts={"report": "what was seen"},
    columns={"age": ColumnSpec(kind="number")},
)
TOWER = {"width": 8, "depth": 1, "heads": 1}
EXPERIMENT = {
    "name": "tiny",
    "inputs": {
        "images": {
            "ct": {"size": [4, 4, 4], "patch": [4, 4, 4], "window": [0, 255]},
            "outline": {"size": [4, 4, 4], "patch": [4, 4, 4], "window": [0, 255]},
        },
        "texts": {"report": {"length": 24}},
        "columns": ["age"],
    },
    "model": {"vision": TOWER, "text": TOWER, "table": TOWER, "fusion": TOWER | {"latents": 2}},
    "tasks": {"masked": {"kind": "masked"}},
    "train": {"steps": 1, "batch_size": 8},
}
CROWD = 24
SPACING = (2.0, 1.0, 0.5)


def study(number, poison=False):
    """Every fourth lacks its images, every fifth its texts; `poison` fills test studies with something else."""
    rng = np.random.default_rng(number)
    test = number // 2 % 3 == 0
    ct = rng.integers(-1000, 400, (5, int(rng.integers(4, 8)), 6, 1)).astype(np.int16)
    outline = 255 * (rng.random((6, 6, 6, 1)) < 0.3).astype(np.uint8)
    texts = (f"nodule {number % 4}.", "a mass.")
    if test and poison:
        ct, outline = ct * 7, np.maximum(outline, 31)
        texts = ("poison poison.",)
    return Study(
        patient=f"{number // 2:032x}",
        split="test" if test else "train",
        images={} if number % 4 == 0 else {"ct": Image(ct, SPACING), "outline": Image(outline, (1.0, 1.0, 1.0))},
        texts={} if number % 5 == 0 else {"report": texts},
        row={"age": float(number)},
    )


def read(folder, poison=False):
    """Samples of a store, and what baselines are given of its splits."""
    write_store(str(folder), SCHEMA, (study(number, poison) for number in range(CROWD)))
    store = StudyStore.open(str(folder))
    experiment = validate(EXPERIMENT | {"data": {"store": store.url}}, "test")
    tokenizer = Tokenizer.train(["nodule"], 300)
    samples = Samples(store, experiment.inputs, make_spec(experiment.inputs, SCHEMA, store.stats, tokenizer), tokenizer)
    train, test = (Split(store.rows(n), store.patients(store.rows(n)), {}, {}, {}, {}) for n in ("train", "test"))
    return samples, read_plain(samples, ("age",), train, test)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return read(tmp_path_factory.mktemp("plain") / "store")


def test_numbers_are_of_whole_images_and_missing_where_there_is_none(held):
    samples, (train, _) = held
    for row, numbers in zip(samples.store.rows("train"), train.image, strict=True):
        number = int(samples.store.table(int(row))[1]["age"])
        of = study(number)
        if not of.images:
            assert np.isnan(numbers).all()
            continue
        ct, outline = (of.images[role].voxels[..., 0] for role in ("ct", "outline"))
        expected = np.concatenate(
            [
                intensity_numbers(ct, SPACING),
                intensity_numbers(outline, (1, 1, 1)),
                shape_numbers(outline / 255, (1, 1, 1)),
            ]
        )
        assert len(expected) == 2 * len(INTENSITY) + len(SHAPE)
        np.testing.assert_allclose(numbers, expected, rtol=1e-5)


def test_texts_are_bags_of_all_readings_and_of_the_first(held):
    _, (train, test) = held
    assert set(train.bags) == {"sentences", "words", "first_sentences", "first_words"} == set(test.bags)
    for split in (train, test):
        silent = split.table.values[:, 0] % 5 == 0
        for bag in split.bags.values():
            np.testing.assert_array_equal(bag.toarray().sum(axis=1) == 0, silent)
        np.testing.assert_allclose(split.bags["sentences"].toarray()[~silent].sum(axis=1), 1)
        np.testing.assert_allclose(split.bags["first_sentences"].toarray()[~silent].sum(axis=1), 1)


def test_nothing_of_the_test_studies_reaches_what_is_fitted(held, tmp_path):
    train, poisoned = held[1][0], read(tmp_path / "store", poison=True)[1][0]
    np.testing.assert_array_equal(poisoned.image, train.image)
    for name, bag in train.bags.items():
        np.testing.assert_array_equal(poisoned.bags[name].toarray(), bag.toarray())


def test_rows_are_drawn_by_patient_and_nested(held):
    store = held[0].store
    every = store.rows("train")
    few, more = drawn_rows(store, "train", 5), drawn_rows(store, "train", 9)
    assert (len(few), len(more)) == (5, 9) and set(few) < set(more) < set(every)
    assert (np.diff(more) > 0).all()
    np.testing.assert_array_equal(drawn_rows(store, "train", len(every)), every)
    place = {int(row): share_of(str(patient)) for row, patient in zip(every, store.patients(every))}
    assert max(place[row] for row in few) <= min(place[row] for row in every if row not in few)


def test_of_a_large_image_the_middle_is_looked_at(held, monkeypatch):
    assert middle_size((128, 128, 128)) == (128, 128, 128)
    assert middle_size((300, 512, 512)) == (75, 128, 128) and middle_size((1, 4096, 2048)) == (1, 1024, 2048)
    monkeypatch.setattr(plain, "LARGEST", 60)
    store = held[0].store
    row = next(int(row) for row in store.rows("train") if store.volume_info("outline", int(row)))
    found = plain._middle(held[0], "outline", row)
    assert found is not None
    voxels, _ = found
    assert voxels.shape == (3, 3, 6, 1)
    whole = store.crop("outline", row, (0, 0, 0), (6, 6, 6))
    np.testing.assert_array_equal(voxels, whole[1:4, 1:4])


def test_a_damaged_image_is_missing_to_baselines_too(tmp_path):
    samples, _ = read(tmp_path / "store")
    rows = [int(row) for row in samples.store.rows("train") if samples.store.volume_info("ct", int(row))]
    for chunk in (tmp_path / "store/volumes/ct" / f"{rows[0]:08d}" / "0/c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(chunk.read_bytes()[:9])
    opened = StudyStore.open(samples.store.url, cache_bytes=0)
    fresh = Samples(opened, samples.inputs, samples.spec, samples.tokenizer)
    with pytest.raises(DamagedImage):
        plain._numbers(fresh, {"ct": None}, np.array(rows))
    fresh.damage.limit = 1
    with pytest.warns(UserWarning, match=f"study {rows[0]} goes on without its image ct"):
        numbers = plain._numbers(fresh, {"ct": None}, np.array(rows))
    assert np.isnan(numbers[0]).all() and np.isfinite(numbers[1:]).all()
