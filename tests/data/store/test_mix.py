"""Several stores are read as one: by weight, each with its own windows, crops and augmentation."""

import itertools
import uuid
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.config.data import Augment, DataConfig
from mmfm_jax.config.inputs import Inputs
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import batch_checksum, local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.data.split import share_of
from mmfm_jax.data.store.masks import summarise
from mmfm_jax.data.store.mix import StoreMix, open_data
from mmfm_jax.data.store.stats import StatsBuilder
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, MaskSpec, Schema, Study
from mmfm_jax.errors import UserError
from mmfm_jax.train import folder
from mmfm_jax.train.start import start_or_resume

AGE, LABEL = ColumnSpec(kind="number", unit="years"), LabelSpec(classes=("benign", "malignant"))
CHEST = Schema(
    images={"ct": ImageSpec(dtype="int16", shape=None)},
    texts={"report": ""},
    columns={"age": AGE, "sex": ColumnSpec(kind="category", vocabulary=("female", "male"))},
    labels={"malignancy": LABEL},
)
HEAD = Schema(
    images={"ct": ImageSpec(dtype="int16", shape=(12, 6, 12)), "mr": ImageSpec(dtype="uint8", shape=(4, 4, 4))},
    columns={"age": AGE, "sex": ColumnSpec(kind="category", vocabulary=("male", "other"))},
    labels={"malignancy": LABEL},
    masks={"organ": MaskSpec(image="ct", classes=("brain", "lesion"))},
)
INPUTS = Inputs.model_validate(
    {
        "images": {
            "ct": {"size": (8, 8, 8), "patch": (4, 4, 4), "window": (-1000, 1000)},
            "mr": {"size": (4, 4, 4), "patch": (2, 2, 2), "window": (0, 255)},
        },
        "texts": {"report": {"length": 8}},
        "columns": ("age", "sex"),
    }
)
MIX = {
    "lung": {"store": "", "weight": 3.0, "images": {"ct": {"crop": "random", "foreground": {"share": 0.5}}}},
    "brain": {
        "store": "",
        "weight": 1.0,
        "images": {"ct": {"window": (0, 80), "crop": "random", "foreground": {"share": 0.5, "mask": "organ"}}},
        "augment": {"flip": 0.0},
    },
}


def chest(n: int, seed: int) -> list[Study]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        voxels = rng.integers(-1000, 1000, (*(int(s) for s in rng.integers(4, 20, 3)), 1)).astype(np.int16)
        row = {"age": float(rng.normal(70, 5)), "sex": ("female", "male")[i % 2]} if i % 3 else {}
        texts = {"report": (f"Lung of study {i}.",)} if i % 2 else {}
        split = ("train", "train", "validation", "test")[i % 4]
        made.append(Study(f"c{i}", split, {"ct": Image(voxels, (2.0, 1.0, 1.0))}, texts, row, {"malignancy": i % 2}))
    return made


def head(n: int, seed: int) -> list[Study]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        images = {"ct": Image(rng.integers(0, 99, (12, 6, 12, 1)).astype(np.int16), (1.0, 1.0, 1.0))}
        images |= {"mr": Image(rng.integers(0, 255, (4, 4, 4, 1)).astype(np.uint8), (1.0, 1.0, 1.0))} if i % 2 else {}
        row: dict[str, float | str] = {"age": float(rng.normal(40, 9)), "sex": ("male", "other")[i % 2]}
        masks = {"organ": rng.integers(0, 3, (12, 6, 12)).astype(np.uint8)} if i % 4 else {}
        made.append(Study(f"h{i}", ("train", "test")[i % 3 == 2], images, {}, row, masks=masks))
    return made


STUDIES = {"brain": head(14, 1), "lung": chest(40, 0)}  # in the order of a mix's rows


def written(schema: Schema, studies: list[Study]) -> str:
    url = f"memory://mix/{uuid.uuid4()}"
    write_store(url, schema, studies)
    return url


def configured(lung: str, brain: str) -> DataConfig:
    mix = {name: {**of, "store": {"lung": lung, "brain": brain}[name]} for name, of in MIX.items()}
    return DataConfig.model_validate({"mix": mix})


@pytest.fixture(scope="module")
def config() -> DataConfig:
    return configured(written(CHEST, STUDIES["lung"]), written(HEAD, STUDIES["brain"]))


@pytest.fixture(scope="module")
def samples(config) -> Samples:
    return samples_of(open_data(config))


def samples_of(store: Any, inputs: Inputs = INPUTS) -> Samples:
    tokenizer = Tokenizer.train(store.texts(store.rows("train")), 300)
    spec = make_spec(inputs, store.schema, store.stats, tokenizer, store.windows(inputs.images))
    return Samples(store, inputs, spec, tokenizer)


def take(samples, rows, start, steps, threads=2, prefetch=2, seed=7):
    batches = local_batches(training_rows(samples, "train", seed), 8, np.asarray(rows), start, threads, prefetch)
    taken = list(itertools.islice(batches, steps))
    batches.close()
    return taken


@settings(max_examples=8, deadline=None)
@given(
    processes=st.sampled_from([1, 2, 4]),
    start=st.integers(0, 12),
    threads=st.integers(1, 6),
    prefetch=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_batches_of_a_mix_depend_on_seed_and_step_alone(samples, processes, start, threads, prefetch, seed):
    expected = take(samples, range(8), 0, start + 3, 1, 1, seed)[start:]
    parts = np.split(np.arange(8), processes)
    local = [take(samples, rows, start, 3, threads, prefetch, seed) for rows in parts]
    joined = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *of_step) for of_step in zip(*local)]
    assert [batch_checksum(b) for b in joined] == [batch_checksum(b) for b in expected]
    assert len({batch_checksum(b) for b in expected}) == 3


def test_every_stretch_holds_the_stores_by_weight_and_every_epoch_each_study_once(samples):
    order: Any = training_rows(samples, "train", 0)
    drawn = [order[i].row for i in range(400)]
    source = np.array([samples.store.source(row) for row in drawn])  # brain is 0, a quarter
    for start, length in itertools.product(range(0, 300, 7), (4, 9, 40)):
        assert abs((source[start : start + length] == 0).sum() - length / 4) <= 1
    for number, rows in enumerate(rows for _, rows in samples.store.sources("train")):
        seen = [row for row, of in zip(drawn, source) if of == number]
        for epoch in range(len(seen) // len(rows)):
            assert Counter(seen[epoch * len(rows) : (epoch + 1) * len(rows)]) == Counter(rows.tolist())


def test_a_study_of_a_mix_is_the_study_of_its_store(samples, config):
    row = 0
    for name in ("brain", "lung"):
        own = StudyStore.open(config.mix[name].store)
        for i in range(len(own)):
            mixed = samples.read(row, None)
            study = STUDIES[name][i]
            assert mixed.study == row and mixed.source == ("brain", "lung").index(name)
            for role, part in mixed.images.items():
                assert part.present == (role in study.images)
            low = 0 if name == "brain" else -1000
            size = np.array(study.images["ct"].voxels.shape[:3])
            padded = np.pad(study.images["ct"].voxels, [(20, 20)] * 3 + [(0, 0)], constant_values=low)
            at = tuple(slice(20 + (h - 8) // 2, 20 + (h - 8) // 2 + 8) for h in size)
            np.testing.assert_array_equal(mixed.images["ct"].voxels, padded[at])
            assert mixed.texts["report"].present == ("report" in study.texts)
            np.testing.assert_allclose(mixed.table.numbers[0], float(study.row.get("age", 0)), rtol=1e-6)
            code = samples.spec.categories["sex"].index(str(study.row["sex"])) if "sex" in study.row else 0
            assert mixed.table.categories[0] == code
            mask, voxels = study.masks.get("organ"), samples.store.mask_voxels("organ", row)
            assert (voxels is None) == (mask is None)
            if mask is not None:
                assert voxels.tolist() == [(mask == value).sum() for value in (1, 2)]
                assert (mask[tuple(samples.store.mask_positions("organ", row, 1).T)] == 2).all()
                np.testing.assert_array_equal(samples.store.mask_crop("organ", row, (0, 0, 0), (12, 6, 12)), mask)
            assert mixed.labels["malignancy"].present == ("malignancy" in study.labels)
            row += 1
    assert row == len(samples.store)
    assert samples.spec.categories == {"sex": ("male", "other", "female")}
    rows = samples.store.rows("train")
    assert sorted(rows) == [i for i, s in enumerate([*STUDIES["brain"], *STUDIES["lung"]]) if s.split == "train"]
    everyone = [s.patient for s in [*STUDIES["brain"], *STUDIES["lung"]]]
    assert samples.store.patients(rows).tolist() == [everyone[i] for i in rows]
    assert samples.store.shares(rows).tolist() == [share_of(everyone[i]) for i in rows]
    few = [samples.store.source(int(row)) for row in rows[:9]]
    assert 0 < few.count(0) < 9  # evenly among each other
    assert len(samples.store.rows("validation")) == 10  # of one store alone


def test_the_fingerprint_is_that_of_all_training_studies(samples):
    builder = StatsBuilder(samples.store.schema)
    for study in [*STUDIES["brain"], *STUDIES["lung"]]:
        if study.split == "train":
            builder.add(study, {name: summarise(mask, 2) for name, mask in study.masks.items()})
    whole, joined = builder.build(), samples.store.stats
    assert joined.categories == whole.categories and joined.texts == whole.texts and joined.masks == whole.masks
    assert joined.images["ct"].spacing_mm_min == whole.images["ct"].spacing_mm_min == (1.0, 1.0, 1.0)
    for name, column in whole.numbers.items():
        for field in ("mean", "sd", "low", "high", "missing"):
            assert getattr(joined.numbers[name], field) == pytest.approx(getattr(column, field))


def test_windows_and_augmentation_are_those_of_the_studys_store(samples, config):
    """As though every study of the batch were of that store."""
    (batch,), key = take(samples, range(8), 3, 1), jax.random.key(3)
    assert batch.source is not None and len(set(batch.source.tolist())) == 2
    strong = Augment(flip=0.5, shift_mm=2, rotate_degrees=20, intensity=0.4)
    weak = Augment(flip=0.0, intensity=0.1)
    mixed = prepare(batch, samples.spec, (weak, strong), key)
    plain = prepare(batch, samples.spec, None, None)
    for number, (augment, window) in enumerate([(weak, (0.0, 80.0)), (strong, (-1000.0, 1000.0))]):
        ct = samples.spec.images["ct"].model_copy(update={"windows": (), "window": window})
        spec = samples.spec.model_copy(update={"images": {**samples.spec.images, "ct": ct}})
        alone, mine = prepare(batch, spec, augment, key), batch.source == number
        for role, part in mixed.images.items():
            np.testing.assert_allclose(part.voxels[mine], alone.images[role].voxels[mine], atol=2e-5)
        low, high = window
        expected = np.clip((batch.images["ct"].voxels[mine] - low) / (high - low), 0, 1)
        np.testing.assert_allclose(plain.images["ct"].voxels[mine], expected, atol=1e-6)
    assert config.augments == (Augment(flip=0.0), Augment())


def test_each_store_has_windows_of_its_own_for_the_same_channels(config):
    """Two windows of ct, others in one of the stores; each volume of mr has its own."""
    images = {
        "ct": {"size": (8, 8, 8), "patch": (4, 4, 4), "window": ((-1000, 1000), (0, 40))},
        "mr": {"size": (4, 4, 4), "patch": (2, 2, 2), "normalise": "zscore"},
    }
    brain = config.mix["brain"].images["ct"].model_copy(update={"window": ((0.0, 80.0), (50.0, 60.0))})
    mixed = config.mix["brain"].model_copy(update={"images": {"ct": brain}})
    store = open_data(config.model_copy(update={"mix": {**config.mix, "brain": mixed}}))
    samples = samples_of(store, Inputs.model_validate({"images": images, "texts": {"report": {"length": 8}}}))
    (batch,) = take(samples, range(8), 3, 1)
    made = prepare(batch, samples.spec, None, None).images
    windows = [[(0, 80), (50, 60)], [(-1000, 1000), (0, 40)]]
    assert batch.source is not None and set(batch.source.tolist()) == {0, 1}
    for at, source in enumerate(batch.source.tolist()):
        raw, present = batch.images["ct"].voxels[at].astype(np.float64), batch.images["ct"].present[at]
        expected = [np.clip((raw - low) / (high - low), 0, 1) * present for low, high in windows[source]]
        np.testing.assert_allclose(made["ct"].voxels[at], np.concatenate(expected, -1), atol=1e-6)
        raw, present = batch.images["mr"].voxels[at].astype(np.float64), batch.images["mr"].present[at]
        if present:  # of 64 voxels, each of which is sampled about as often
            close = np.clip((raw - raw.mean()) / raw.std() / 8 + 0.5, 0, 1)
            assert np.abs(made["mr"].voxels[at] - close).max() < 0.05


def test_crops_are_drawn_in_every_store_that_asks_for_it(samples):
    rng = np.random.default_rng(0)
    for source, rows in enumerate(rows for _, rows in samples.store.sources("train")):
        large = next(r for r in rows if max(samples.store.volume_info("ct", r)[0]) > 12 or source == 0)
        starts = [samples.draw(int(large), rng).boxes["ct"].start for _ in range(60)]
        assert len(set(starts)) > 1 and (source == 1 or all(start[1] == -1 for start in starts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"ct": ImageSpec(dtype="uint8", shape=None)}}, "image ct is int16 1 in brain and uint8 1 in lung"),
        (
            {"columns": {"age": ColumnSpec(kind="number", unit="days")}},
            "column age is number years in brain and number",
        ),
        (
            {"images": CHEST.images, "masks": {"organ": MaskSpec(image="ct", classes=("lung",))}},
            "mask organ is ct brain lesion in brain and ct lung in lung",
        ),
        ({"labels": {"malignancy": LabelSpec(classes=("no", "yes"))}}, "label malignancy is benign malignant in brain"),
    ],
)
def test_stores_that_mean_different_things_by_one_name_are_refused(change, message):
    other = Schema(texts={"report": ""}).model_copy(update=change)
    lung = written(other, [Study("x", "train", texts={"report": ("Text.",)})])
    with pytest.raises(UserError, match=f"data.mix: {message}"):
        open_data(configured(lung, written(HEAD, STUDIES["brain"])))


def test_a_patient_in_two_splits_of_two_stores_is_refused():
    held_out = [Study("h0", "test", texts={"report": ("Text.",)})]
    lung = written(Schema(texts={"report": ""}), held_out)
    with pytest.raises(UserError, match=r"data\.mix: 1 patients are in one split") as raised:
        open_data(configured(lung, written(HEAD, STUDIES["brain"])))
    assert "h0" not in str(raised.value)


def test_a_store_without_training_patients_is_named():
    lung = written(Schema(texts={"report": ""}), [Study("z", "test", texts={"report": ("Text.",)})])
    samples = samples_of(open_data(configured(lung, written(HEAD, STUDIES["brain"]))))
    with pytest.raises(UserError, match="the split train has no patients"):
        training_rows(samples, "train", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.mix": {"a": {"store": "x"}}}, "give either `store` or, for several stores, `mix`"),
        ({"data.store": ""}, "give either `store` or, for several stores, `mix`"),
        (
            {"data.store": "", "data.mix": {"a": {"store": "x", "images": {"mr": {"crop": "random"}}}}},
            "data.mix.a.images: mr is not among inputs.images",
        ),
        (
            {"data.store": "", "data.mix": {"a": {"store": "x", "images": {"ct": {"window": [3, 1]}}}}},
            "is empty; give",
        ),
        (
            {"data.store": "", "data.mix": {"a": {"store": "x", "images": {"ct": {"window": [[0, 1], [0, 2]]}}}}},
            "data.mix.a.images.ct.window: gives 2 windows where inputs.images.ct has 1",
        ),
        (
            {"data.store": "", "data.augment": {}, "data.mix": {"a": {"store": "x", "augment": {"flip": [0, 0, 0.1]}}}},
            "data.mix.a.augment.flip: a mirror image swaps left and right, which texts of tasks.image_text may name",
        ),
    ],
)
def test_a_mix_that_cannot_be_is_an_error_of_the_configuration(make_experiment, changes, message):
    with pytest.raises(UserError, match=message):
        make_experiment(changes)


def test_a_run_starts_and_goes_on_with_a_mix_wherever_its_stores_are(make_experiment, tmp_path):
    urls = {"lung": written(CHEST, STUDIES["lung"]), "brain": written(HEAD, STUDIES["brain"])}

    def experiment(urls: dict[str, str], weight: float = 1.0):
        mix = {name: {"store": url, "weight": weight} for name, url in urls.items()}
        inputs = {
            "images": {"ct": {"size": [8, 8, 8], "patch": [4, 4, 4], "window": [0, 80]}},
            "texts": {"report": {"length": 8}},
        }
        tasks = {"image_text": {"kind": "contrastive", "between": ["image", "text"], "width": 16}}
        return make_experiment({"data.store": "", "data.mix": mix, "inputs": inputs, "tasks": tasks})

    first = experiment(urls)
    spec, _ = start_or_resume(first, open_data(first.data), tmp_path / "run", writes=True)
    moved = experiment({**urls, "lung": written(CHEST, STUDIES["lung"])})
    store = open_data(moved.data)
    assert isinstance(store, StoreMix)
    assert start_or_resume(moved, store, tmp_path / "run", writes=True)[0] == spec
    assert folder.read(tmp_path / "run")[0] == moved
    other = experiment(urls, weight=2.0)
    with pytest.raises(UserError, match=r"started with data\.mix\.brain\.weight 1\.0"):
        start_or_resume(other, open_data(other.data), tmp_path / "run", writes=True)
