"""Crops of a store of native spacings come at one spacing, as scipy and plain sums over whole volumes give them."""

import json
import uuid

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mmfm_jax.config.inputs import Inputs
from mmfm_jax.data.feed import resample
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import Image, ImageSpec, Schema, Study
from mmfm_jax.errors import UserError

SIZE, TARGET, LOW, HIGH = (6, 8, 10), (2.0, 1.5, 1.0), -1000.0, 1000.0
SCHEMA = Schema(images={"ct": ImageSpec(dtype="int16", shape=None), "film": ImageSpec(dtype="uint8", shape=(1, 9, 9))})
SPACINGS = [(2.0, 1.5, 1.0), (0.7, 0.9, 0.8), (5.0, 3.1, 2.9), (1.0, 4.0, 0.6), (2.0, 1.5, 0.33), None]


def studies() -> list[Study]:
    """Noise at many spacings, one study without it, and one for test that is finer than all others."""
    rng, made = np.random.default_rng(0), []
    for i, spacing in enumerate([*SPACINGS, (0.2, 0.2, 0.2)]):
        images = {"film": Image(rng.integers(0, 255, (1, 9, 9, 1)).astype(np.uint8), (1.0, 0.5, 0.5))}
        if spacing:
            shape = tuple(int(s) for s in rng.integers(4, 40, 3))
            images["ct"] = Image(rng.integers(-1000, 1000, (*shape, 1)).astype(np.int16), spacing)
        made.append(Study(f"p{i}", "train" if i < len(SPACINGS) else "test", images))
    return made


STUDIES = studies()


def samples_of(store: StudyStore, crop: str = "random", target=TARGET) -> Samples:
    images = {
        "ct": {"size": SIZE, "patch": (2, 2, 2), "window": (LOW, HIGH), "crop": crop, "spacing_mm": target},
        "film": {"size": (1, 6, 6), "patch": (1, 2, 2), "window": (0, 255), "spacing_mm": (3.0, 1.0, 1.0)},
    }
    inputs = Inputs.model_validate({"images": images})
    tokenizer = Tokenizer.train(["nothing"], 300)
    return Samples(store, inputs, make_spec(inputs, store.schema, store.stats, tokenizer), tokenizer)


@pytest.fixture(scope="module")
def store() -> StudyStore:
    url = f"memory://resample/{uuid.uuid4()}"
    write_store(url, SCHEMA, STUDIES)
    return StudyStore.open(url)


def expected_crop(row: int, start, size) -> np.ndarray:
    """By sums over the whole volume in float64, the air around it included; where it only interpolates, scipy too."""
    image = STUDIES[row].images["ct"]
    padded = np.pad(image.voxels[..., 0].astype(np.float64), 80, constant_values=LOW)
    step = np.array(TARGET) / image.spacing_mm
    centre = np.add(start, np.divide(size, 2)) - 0.5 + 80
    at = [c + (np.arange(m) - (m - 1) / 2) * s for c, m, s in zip(centre, SIZE, step)]
    out = padded
    for axis in range(3):
        kernel = np.clip(1 - np.abs(np.arange(out.shape[axis]) - at[axis][:, None]) / max(1.0, step[axis]), 0, None)
        out = np.moveaxis(np.tensordot(kernel / kernel.sum(1, keepdims=True), out, (1, axis)), 0, axis)
    if (step <= 1).all():
        grid = np.stack(np.meshgrid(*at, indexing="ij"))
        np.testing.assert_allclose(out, ndimage.map_coordinates(padded, grid, order=1), atol=1e-6)
    return (out - LOW) / (HIGH - LOW)


@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), crop=st.sampled_from(["random", "centre"]))
def test_crops_are_those_of_the_whole_volume_at_the_target_spacing(store, seed, crop):
    samples = samples_of(store, crop)
    drawn = [samples.draw(row, np.random.default_rng(seed + row)) for row in range(len(SPACINGS))]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *[study.read() for study in drawn])
    part = prepare(batch, samples.spec, None, None).images["ct"]
    assert part.voxels.shape == (len(SPACINGS), *SIZE, 1)
    for row, study in enumerate(drawn):
        if SPACINGS[row] is None:
            assert not part.present[row] and not np.asarray(part.voxels[row]).any() and not part.spacing_mm[row].any()
            continue
        box = study.boxes["ct"]
        expected = expected_crop(row, box.start, box.size)
        np.testing.assert_allclose(part.voxels[row, ..., 0], expected, atol=2e-5)
        np.testing.assert_allclose(part.spacing_mm[row], TARGET)


def test_an_image_of_the_target_spacing_is_as_it_was(store):
    samples = samples_of(store, "centre")
    study = samples.draw(0, None)
    part = prepare(jax.tree.map(lambda leaf: leaf[None], study.read()), samples.spec, None, None).images["ct"]
    box, voxels = study.boxes["ct"], STUDIES[0].images["ct"].voxels
    inner = tuple(slice(40 + a + (n - s) // 2, 40 + a + (n + s) // 2) for a, n, s in zip(box.start, box.size, SIZE))
    padded = np.pad(voxels, [(40, 40)] * 3 + [(0, 0)], constant_values=int(LOW))[inner]
    np.testing.assert_allclose(part.voxels[0], (padded - LOW) / (HIGH - LOW), atol=1e-6)


def test_no_more_is_read_than_the_field_of_view_and_the_kernel_need(store):
    samples = samples_of(store)
    assert store.stats.images["ct"].spacing_mm_min == (0.7, 0.9, 0.33)
    assert samples.spec.images["ct"].read == resample.extent(SIZE, TARGET, (0.7, 0.9, 0.33))
    for row, spacing in enumerate(SPACINGS):
        if spacing:
            size = samples.draw(row, None).boxes["ct"].size
            view = (np.array(SIZE) - 1) * TARGET  # between the centres of the outermost voxels
            reach = 2 * np.maximum(spacing, TARGET)
            assert ((np.array(size) * spacing >= view + reach - 1e-6).all()) and (
                np.mod(size, 2) == np.mod(SIZE, 2)
            ).all()
            assert (np.array(size) * spacing < view + reach + 2 * np.array(spacing)).all()


def test_an_image_finer_than_any_for_training_keeps_its_middle_and_is_empty_around(store):
    samples = samples_of(store, "centre")
    row = len(SPACINGS)
    batch = jax.tree.map(lambda leaf: leaf[None], samples.read(row, None))
    out = np.asarray(prepare(batch, samples.spec, None, None).images["ct"].voxels[0, ..., 0])
    assert np.isfinite(out).all() and out[2:4, 3:5, 4:6].any()
    assert batch.images["ct"].voxels.shape[1:4] == samples.spec.images["ct"].read


def test_a_single_slice_keeps_its_place_and_its_thickness(store):
    samples = samples_of(store)
    assert samples.spec.images["film"].read == resample.extent((1, 6, 6), (3.0, 1.0, 1.0), (1.0, 0.5, 0.5))
    batch = jax.tree.map(lambda leaf: leaf[None], samples.read(0, None))
    part = prepare(batch, samples.spec, None, None).images["film"]
    assert part.voxels.shape == (1, 1, 6, 6, 1)
    np.testing.assert_allclose(part.spacing_mm[0], (1.0, 1.0, 1.0))


def test_training_batches_have_room_for_the_finest(store):
    samples = samples_of(store)
    batches = local_batches(training_rows(samples, "train", 0), 4, np.arange(4), 0, 2, 1)
    assert next(batches).images["ct"].voxels.shape == (4, *(samples.spec.images["ct"].read or ()), 1)
    batches.close()


def test_what_cannot_be_resampled_is_an_error(make_experiment, tmp_path):
    ct = {"size": [4, 8, 8], "patch": [2, 4, 4], "window": [0, 255], "spacing_mm": [1, 1, 1]}
    with pytest.raises(UserError, match="spacing_mm resamples voxels across patches"):
        make_experiment({"inputs": {"images": {"ct": {**ct, "pack": {"studies": 2, "tokens": 20}}}}})
    url = tmp_path / "store"
    write_store(str(url), SCHEMA, STUDIES[:2])
    stats = json.loads((url / "stats.json").read_text())
    for image in stats["images"].values():
        del image["spacing_mm_min"]
    (url / "stats.json").write_text(json.dumps(stats))
    with pytest.raises(UserError, match=r"images\.ct\.spacing_mm: the store does not say how fine"):
        samples_of(StudyStore.open(str(url)))
