"""The global batch is a function of (data config, seed, step) alone, and studies enter it as the configuration says."""

import gc
import itertools
import threading
import time
import tracemalloc
import uuid
import weakref
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.config.inputs import Inputs
from mmfm_jax.data.batch import Batch, NumberStats
from mmfm_jax.data.feed.example import Samples, digest
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import batch_checksum, evaluation_batches, local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, Schema, Study
from mmfm_jax.errors import UserError

SCHEMA = Schema(
    images={
        "nodule": ImageSpec(dtype="uint8", shape=(6, 8, 8)),
        "ct": ImageSpec(dtype="int16", shape=None, channels=2),
    },
    texts={"report": "", "history": ""},
    columns={
        "age": ColumnSpec(kind="number", unit="years"),
        "constant": ColumnSpec(kind="number"),
        "sex": ColumnSpec(kind="category", vocabulary=("female", "male")),
    },
    labels={"malignancy": LabelSpec(classes=("benign", "malignant"))},
)
INPUTS = Inputs.model_validate(
    {
        "images": {
            "nodule": {"size": (4, 4, 4), "patch": (2, 2, 2), "window": (0, 255), "crop": "random"},
            "ct": {"size": (8, 8, 8), "patch": (4, 4, 4), "window": (-1000, 400)},
        },
        "texts": {"report": {"length": 40, "sentence_keep": 0.5}, "history": {"length": 6}},
        "columns": ("age", "constant", "sex"),
    }
)


def make_studies(n: int) -> list[Study]:
    """Random studies, any part of which may be missing; voxels of `ct` are their own coordinates."""
    rng = np.random.default_rng(0)

    def some(held: dict) -> dict:
        return {name: value for name, value in held.items() if rng.random() < 0.8}

    made = []
    for i in range(n):
        shape = tuple(int(s) for s in rng.integers(2, 20, 3))
        images = {
            "nodule": Image(rng.integers(0, 255, (6, 8, 8, 1)).astype(np.uint8), (1.0, 1.0, 1.0)),
            "ct": Image(np.stack([np.arange(np.prod(shape)).reshape(shape)] * 2, -1).astype(np.int16), (2.5, 0.7, 0.7)),
        }
        texts = {
            "report": tuple(f"Reader {r}. Study {i}. Third sentence? Fourth!" for r in range(rng.integers(1, 4))),
            "history": (f"Patient {i}.",),
        }
        row = {"age": float(rng.normal(60, 9)), "constant": 3.0, "sex": ("female", "male")[i % 2]}
        labels = {"malignancy": i % 2}
        split = "test" if i % 4 == 3 else "train"
        made.append(Study(f"patient{i}", split, some(images), some(texts), some(row), some(labels)))
    return made


STUDIES = make_studies(36)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return samples_of(STUDIES)


def samples_of(studies: list[Study], inputs: Inputs = INPUTS) -> Samples:
    url = f"memory://pipeline/{uuid.uuid4()}"
    write_store(url, SCHEMA, studies)
    store = StudyStore.open(url)
    tokenizer = Tokenizer.train(store.texts(store.rows("train")), 300)
    return Samples(store, inputs, make_spec(inputs, store.schema, store.stats, tokenizer), tokenizer)


def take(dataset, batch_size, rows, start, steps, threads=2, prefetch=2) -> list[Batch]:
    batches = local_batches(dataset, batch_size, np.asarray(rows), start, threads, prefetch)
    taken = list(itertools.islice(batches, steps))
    batches.close()
    return taken


def checksums(batches: list[Batch]) -> list[str]:
    return [batch_checksum(batch) for batch in batches]


def rows_of(batch: Batch, which) -> Batch:
    return jax.tree.map(lambda leaf: leaf[which], batch)


# ---------------------------------------------------------------- order


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    processes=st.sampled_from([1, 2, 4]),
    start=st.integers(0, 12),
    threads=st.integers(1, 6),
    prefetch=st.integers(1, 4),
    shuffled=st.booleans(),
)
def test_global_batches_depend_on_seed_and_step_alone(samples, seed, processes, start, threads, prefetch, shuffled):
    """Not on processes, nor on which rows each of them reads, nor on threads, read-ahead or where a run begins."""
    expected = take(training_rows(samples, "train", seed), 8, range(8), 0, start + 3, 1, 1)[start:]
    order = np.random.default_rng(seed).permutation(8) if shuffled else np.arange(8)
    parts = np.split(order, processes)
    local = [take(training_rows(samples, "train", seed), 8, rows, start, 3, threads, prefetch) for rows in parts]
    back = np.argsort(order)
    joined = [jax.tree.map(lambda *leaves: np.concatenate(leaves)[back], *of_step) for of_step in zip(*local)]
    assert checksums(joined) == checksums(expected)


def test_a_process_may_share_rows_with_another(samples):
    dataset: Any = training_rows(samples, "train", 0)
    (whole,), (some,) = (take(dataset, 8, rows, 5, 1) for rows in (range(8), [6, 1, 1]))
    assert batch_checksum(some) == batch_checksum(rows_of(whole, np.array([6, 1, 1])))


def test_every_study_comes_once_an_epoch_in_another_order_each_time(samples):
    rows = samples.store.rows("train")
    dataset: Any = training_rows(samples, "train", 0)
    epochs = [[int(dataset[e * len(rows) + i].row) for i in range(len(rows))] for e in range(4)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != rows.tolist()


def test_a_study_is_drawn_anew_each_epoch(samples):
    n = len(samples.store.rows("train"))
    dataset: Any = training_rows(samples, "train", 0)
    seen = [{int(sample.study): sample for sample in (dataset[e * n + i].read() for i in range(n))} for e in range(2)]
    different = [row for row in seen[0] if batch_checksum(seen[0][row]) != batch_checksum(seen[1][row])]
    assert len(different) > n / 2


def test_neighbouring_seeds_share_no_epochs(samples):
    """grain shuffles epoch e with (seed + e), so seeds taken as they are would repeat each other one epoch apart."""
    n = len(samples.store.rows("train"))
    datasets: Any = [training_rows(samples, "train", seed) for seed in range(3)]
    orders = [tuple(int(dataset[e * n + i].row) for i in range(n)) for dataset in datasets for e in range(3)]
    assert len(set(orders)) == len(orders)


def test_the_order_of_a_huge_split_is_never_in_memory():
    rows = np.arange(10_000_000, dtype=np.uint32)

    class Huge:
        """Ten million rows; what is drawn is the row and a number."""

        class store:
            @staticmethod
            def sources(split):
                return [(1.0, rows)]

        @staticmethod
        def draw(row, rng):
            return np.array([row, rng.integers(2**60)])

    huge: Any = Huge
    tracemalloc.start()
    dataset = training_rows(huge, "train", 0)
    drawn = np.array([dataset[i] for i in [*range(500), *range(10_000_000 - 500, 10_000_000)]])
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 1.1 * rows.nbytes  # the rows themselves, 4 bytes a study
    assert len(set(drawn[:, 0])) == 1000 == len(set(drawn[:, 1]))
    assert abs(drawn[:, 0].mean() / 1e7 - 0.5) < 0.05


# ---------------------------------------------------------------- evaluation


@settings(max_examples=10, deadline=None)
@given(batch_size=st.integers(1, 12), split=st.sampled_from(["train", "test"]), limit=st.none() | st.integers(1, 40))
def test_evaluation_shows_every_study_once_in_order_and_fills_up_with_absent_ones(samples, batch_size, split, limit):
    batches = list(evaluation_batches(samples, split, batch_size, np.arange(batch_size), limit))
    studies = np.concatenate([batch.study for batch in batches])
    expected = samples.store.rows(split)[:limit]
    assert len(studies) == -(-len(expected) // batch_size) * batch_size
    assert studies[: len(expected)].tolist() == expected.tolist() and (studies[len(expected) :] == -1).all()
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
    for i, row in enumerate(expected):
        assert batch_checksum(rows_of(whole, i)) == batch_checksum(samples.read(row, None))
    filling = rows_of(whole, slice(len(expected), None))
    for leaf in jax.tree.leaves((filling.images, filling.texts, filling.table, filling.labels)):
        assert not leaf.any()


def test_processes_share_an_evaluation(samples):
    whole = list(evaluation_batches(samples, "train", 8, np.arange(8)))
    halves = [list(evaluation_batches(samples, "train", 8, rows)) for rows in (np.arange(4), np.arange(4, 8))]
    joined = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *both) for both in zip(*halves, strict=True)]
    assert checksums(joined) == checksums(whole)


# ---------------------------------------------------------------- one study


@pytest.mark.parametrize("row", range(0, 36, 5))
def test_without_a_generator_crops_are_central_and_texts_are_first_and_whole(samples, row):
    study, sample = STUDIES[row], samples.read(row, None)
    assert sample.study == row
    for role, size in (("nodule", (4, 4, 4)), ("ct", (8, 8, 8))):
        part = sample.images[role]
        assert part.present == (role in study.images) and part.voxels.shape[:3] == size
        assert part.voxels.dtype == SCHEMA.images[role].dtype
        if part.present:
            held = study.images[role].voxels
            fill = 0 if role == "nodule" else -1000
            padded = np.pad(held, [(20, 20)] * 3 + [(0, 0)], constant_values=fill)
            # The centres coincide; where they cannot, the crop starts half a voxel lower.
            at = tuple(slice(a, a + s) for a, s in ((20 + (h - s) // 2, s) for h, s in zip(held.shape, size)))
            np.testing.assert_array_equal(part.voxels, padded[at])
            np.testing.assert_allclose(part.spacing_mm, study.images[role].spacing_mm, rtol=1e-6)
    for field, length in (("report", 40), ("history", 6)):
        part = sample.texts[field]
        assert part.present == (field in study.texts)
        expected = samples.tokenizer.encode(study.texts[field][0], length) if part.present else np.zeros(length)
        np.testing.assert_array_equal(part.tokens, expected)
    table = sample.table
    assert table.number_present.tolist() == ["age" in study.row, "constant" in study.row]
    np.testing.assert_allclose(table.numbers, [study.row.get(c, 0) for c in ("age", "constant")], rtol=1e-6)
    assert table.category_present.tolist() == ["sex" in study.row]
    assert table.categories.tolist() == [int(study.row.get("sex") == "male")]
    label = sample.labels["malignancy"]
    assert label.present == ("malignancy" in study.labels) and label.value == study.labels.get("malignancy", 0)


def test_random_crops_are_everywhere_within_the_volume_and_nowhere_else():
    ramp = np.arange(6 * 8 * 8).reshape(6, 8, 8, 1).astype(np.int16)
    studies = [Study("p", "train", {"ct": Image(np.repeat(ramp, 2, -1), (1.0, 1.0, 1.0))})]
    inputs = INPUTS.model_copy(
        update={"images": {"ct": INPUTS.images["ct"].model_copy(update={"size": (4, 7, 8), "crop": "random"})}}
    )
    samples, rng = samples_of(studies, inputs), np.random.default_rng(0)
    starts = Counter()
    for _ in range(300):
        voxels = samples.read(0, rng).images["ct"].voxels[..., 0]
        z, y, x = np.unravel_index(int(voxels[0, 0, 0]), (6, 8, 8))
        np.testing.assert_array_equal(voxels, ramp[z : z + 4, y : y + 7, x : x + 8, 0])
        starts[int(z), int(y), int(x)] += 1
    assert set(starts) == {(z, y, 0) for z in range(3) for y in range(2)}
    assert min(starts.values()) > 20


def test_training_draws_a_reader_and_some_sentences_in_any_order(samples):
    row = next(i for i, study in enumerate(STUDIES) if len(study.texts.get("report", ())) == 3)
    rng, seen, kept = np.random.default_rng(0), set(), []
    for _ in range(300):
        text = samples.tokenizer.decode(samples.read(row, rng).texts["report"].tokens)
        sentences = text.replace("?", ".").replace("!", ".").strip(".").split(". ")
        assert {s for s in sentences if not s.startswith("reader")} <= {f"study {row}", "third sentence", "fourth"}
        assert len(set(sentences)) == len(sentences) >= 1
        seen.add(text)
        kept.append(len(sentences))
    assert {text[:9] for text in seen if text.startswith("reader")} >= {"reader 0.", "reader 1.", "reader 2."}
    expected = 4 * 0.5 + 0.5**4  # of the binomial, and one where it gives none
    assert abs(np.mean(kept) - expected) < 0.2
    order = [[text.find(s) for s in ("third", "fourth")] for text in seen if "third" in text and "fourth" in text]
    assert 0.2 < np.mean([a < b for a, b in order]) < 0.8
    whole = {samples.tokenizer.decode(samples.read(row, rng).texts["history"].tokens) for _ in range(20)}
    assert len(whole) == 1


def test_training_draws_how_many_texts_stand_side_by_side_and_which():
    """Every number and every choice of so many texts is equally likely, in any order; evaluation shows the first."""
    texts = tuple(f"Reader {r}. Text {r}." for r in range(3))
    studies = [Study("p", "train", texts={"report": texts}), Study("q", "train", texts={"report": texts[:1]})]
    inputs = Inputs.model_validate({"texts": {"report": {"length": 20, "readings": 2}}})
    samples, rng = samples_of(studies, inputs), np.random.default_rng(0)
    assert samples.spec.readings == {"report": 2} and samples.spec.text_tokens == {"report": 40}
    place = {samples.tokenizer.encode(text, 20).tobytes(): i for i, text in enumerate(texts)} | {bytes(80): None}
    whole = {None: bytes(8)} | {i: digest(text).tobytes() for i, text in enumerate(texts)}
    drawn = Counter()
    for _ in range(600):
        part = samples.read(0, rng).texts["report"]
        found = tuple(place[part.tokens[at : at + 20].tobytes()] for at in (0, 20))
        drawn[found] += 1
        assert part.digest.tobytes() == b"".join(whole[text] for text in found)
    expected = {(i, None): 100 for i in range(3)} | dict.fromkeys(itertools.permutations(range(3), 2), 50)
    assert set(drawn) == set(expected)
    assert all(abs(drawn[found] - often) < 5 * often**0.5 for found, often in expected.items())
    for row, generator in ((0, None), (1, None), (1, rng)):
        tokens = samples.read(row, generator).texts["report"].tokens
        assert place[tokens[:20].tobytes()] == 0 and not tokens[20:].any()


def test_an_excerpt_is_some_sentences_of_the_first_text_drawn_beside_whole_texts():
    texts = tuple(f"Reader {r}. Round {r}. Smooth {r}." for r in range(3))
    field = {"length": 20, "readings": 2, "excerpt": 0.5}
    inputs = Inputs.model_validate({"texts": {"report": field}})
    studies = [Study("p", "train", texts={"report": texts}), Study("q", "train", texts={})]
    samples, rng = samples_of(studies, inputs), np.random.default_rng(0)
    kept, orders = [], set()
    for _ in range(300):
        part = samples.read(0, rng).texts["report"]
        shown, said = (samples.tokenizer.decode(np.asarray(tokens)) for tokens in (part.tokens[:20], part.excerpt))
        reader = shown.split(".")[0][-1]
        sentences = [sentence.strip() for sentence in said.split(".") if sentence]
        assert set(sentences) <= {f"{word} {reader}" for word in ("reader", "round", "smooth")}
        assert shown == f"reader {reader}. round {reader}. smooth {reader}." and len(set(sentences)) == len(sentences)
        kept.append(len(sentences))
        orders.add(tuple(sentence[:2] for sentence in sentences))
    assert len(orders) == 15  # every choice of sentences in every order
    assert abs(np.mean(kept) - (3 * 0.5 + 0.5**3)) < 0.2
    assert not np.any(samples.read(1, rng).texts["report"].excerpt)  # no text
    assert not np.any(samples.read(0, None).texts["report"].excerpt)  # evaluation draws none


def test_a_category_that_the_model_does_not_know_counts_as_missing(samples):
    row = next(i for i, study in enumerate(STUDIES) if study.row.get("sex") == "male")
    spec = samples.spec.model_copy(update={"categories": {"sex": ("female", "other")}})
    table = Samples(samples.store, INPUTS, spec, samples.tokenizer).read(row, None).table
    assert table.category_present.tolist() == [False] and table.categories.tolist() == [0]


def test_a_missing_category_is_not_the_category_none(samples):
    row = next(i for i, study in enumerate(STUDIES) if "sex" not in study.row)
    spec = samples.spec.model_copy(update={"categories": {"sex": ("", "None", "nan")}})
    table = Samples(samples.store, INPUTS, spec, samples.tokenizer).read(row, None).table
    assert table.category_present.tolist() == [False]


# ---------------------------------------------------------------- specification and errors


def test_the_specification_follows_the_store(samples):
    spec, ages = samples.spec, [float(s.row["age"]) for s in STUDIES if s.split == "train" and "age" in s.row]
    assert spec.numbers["age"].mean == pytest.approx(np.mean(ages)) and spec.numbers["age"].sd == pytest.approx(
        np.std(ages)
    )
    assert spec.numbers["constant"] == NumberStats(mean=3, sd=1)
    assert spec.categories == {"sex": ("female", "male")} and spec.labels == {"malignancy": ("benign", "malignant")}
    assert spec.images["ct"].channels == 2 and spec.texts == {"report": 40, "history": 6}
    assert (spec.vocabulary_size, spec.mask_token) == (samples.tokenizer.vocabulary_size, samples.tokenizer.mask_token)


@pytest.mark.parametrize(
    ("part", "inputs"),
    [
        ("inputs.images", {"images": {"mri": {"size": (4, 4, 4), "patch": (2, 2, 2), "window": (0, 1)}}}),
        ("inputs.texts", {"texts": {"mri": {"length": 4}}}),
        ("inputs.columns", {"columns": ("age", "mri")}),
    ],
)
def test_an_input_that_the_store_lacks_is_named(samples, part, inputs):
    store = samples.store
    with pytest.raises(UserError, match=f"{part}: the store has no mri; it has "):
        make_spec(Inputs.model_validate(inputs), store.schema, store.stats, samples.tokenizer)


def test_a_split_without_patients_is_refused_before_anything_is_read(samples):
    with pytest.raises(UserError, match="validation has no patients"):
        training_rows(samples, "validation", 0)
    with pytest.raises(UserError, match="validation has no patients"):
        evaluation_batches(samples, "validation", 4, np.arange(4))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_reader_raises_reaches_the_consumer_unchanged_and_stops_the_threads(samples, monkeypatch, training):
    error, read, bad = UserError("store/volumes/ct: cut short"), samples.draw, samples.store.rows("train")[10]

    def failing(row, rng):
        if row == bad:
            raise error
        return read(row, rng)

    monkeypatch.setattr(samples, "draw", failing)
    rows = np.arange(4)
    if training:
        batches = local_batches(training_rows(samples, "train", 0), 4, rows, 0, 3, 2)
    else:
        batches = evaluation_batches(samples, "train", 4, rows)
    with pytest.raises(UserError) as raised:
        list(batches)
    assert raised.value is error
    assert_no_reader_threads()


def test_closing_stops_the_threads_at_once_and_reads_no_further_than_asked(samples, monkeypatch):
    begun, read = [], samples.draw

    def slow(row, rng):
        begun.append(row)
        time.sleep(0.02)
        return read(row, rng)

    monkeypatch.setattr(samples, "draw", slow)
    batches = local_batches(training_rows(samples, "train", 0), 4, np.arange(4), 0, 2, 3)
    next(batches)
    deadline = time.monotonic() + 60
    while len(begun) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # ten reads more, were they allowed
    assert 12 <= len(begun) <= 4 + 3 * 4
    next(batches)
    batches.close()
    assert_no_reader_threads()
    assert len(begun) <= 4 + 3 * 4 + 4

    begun.clear()
    batches = local_batches(training_rows(samples, "train", 0), 4, np.arange(4), 0, 2, 20)
    next(batches)
    before = len(begun)
    batches.close()  # of twenty batches that it may read ahead
    assert_no_reader_threads()
    assert len(begun) <= before + 2 * 4


def test_voxels_in_memory_are_those_of_the_batches_ahead_however_slow_the_consumer(samples, monkeypatch):
    made: list = []
    make = samples.room

    def watched(*args):
        room = make(*args)
        made.append(weakref.ref(room.images["ct"].voxels))
        return room

    monkeypatch.setattr(samples, "room", watched)
    for prefetch in (1, 3):
        made.clear()
        batches = local_batches(training_rows(samples, "train", 0), 4, np.arange(4), 0, 4, prefetch)
        most = 0
        for _ in range(30):
            batch = next(batches)
            time.sleep(0.01)
            most = max(most, sum(room() is not None for room in made))
        assert len(made) >= 30 and most <= prefetch + 3  # ahead, put together, handed out, begun
        batches.close()
        del batch
        gc.collect()
        assert not any(room() is not None for room in made)


def assert_no_reader_threads() -> None:
    deadline = time.monotonic() + 60
    while any(thread.name.startswith("mmfm-") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
        time.sleep(0.01)


def test_the_checksum_sees_values_shapes_dtypes_and_names(samples):
    batch = samples.read(0, None)
    changed = [
        jax.tree.map(lambda leaf: leaf[None], batch),
        jax.tree.map(lambda leaf: leaf.view(np.uint32) if leaf.dtype == np.int32 else leaf, batch),
        samples.read(1, None),
    ]
    leaves, structure = jax.tree.flatten(batch)
    for i in range(len(leaves)):
        other = [leaf.copy() for leaf in leaves]
        last = other[i].reshape(-1)[-1:]
        last[:] = last == 0
        changed.append(jax.tree.unflatten(structure, other))
    assert (
        batch_checksum(batch) == batch_checksum(jax.tree.map(np.array, batch)) == batch_checksum(jax.device_put(batch))
    )
    assert len({batch_checksum(b) for b in [batch, *changed]}) == len(changed) + 1
