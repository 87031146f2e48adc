"""Windows as channels and windows of a volume's own intensities, from the store to what the model is given."""

import itertools
import statistics
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.config.inputs import Inputs, ZScore
from mmfm_jax.data.batch import Batch, ImageShape, InputSpec, PackedShape
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.intensity import own_limits
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.data.store.foreground import SAMPLED, places
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import Image, ImageSpec, Schema, Study
from mmfm_jax.errors import UserError
from mmfm_jax.evaluate.pictures import middle_slice
from mmfm_jax.model.vision import as_patches
from mmfm_jax.plan import lower, measure

PATCH = (2, 3, 4)
SIZE = (6, 9, 8)
WINDOWS = ((-900.0, 100.0), (-150.0, 250.5), (300.0, 1500.0))
KINDS: tuple[Any, ...] = ("zscore", "zscore_foreground", {"percentiles": (5.0, 90.0)})
PACK = {"studies": 2, "tokens": 60}


def stored(volumes: list, stacked: bool = False) -> StudyStore:
    """A store of images `scan`, int16 [z, y, x, channel]; None for a study without."""
    url = f"memory://intensity/{uuid.uuid4()}"
    first = next(v for v in volumes if v is not None)
    shape = first.shape[:3] if stacked else None
    schema = Schema(images={"scan": ImageSpec(dtype="int16", shape=shape, channels=first.shape[3])})
    images = [{} if v is None else {"scan": Image(v.astype(np.int16), (2.0, 1.0, 0.5))} for v in volumes]
    write_store(url, schema, [Study(f"p{i}", "train", of) for i, of in enumerate(images)])
    return StudyStore.open(url)


def samples_of(store: Any, max_damaged: Any = 0, **image: Any) -> Samples:
    inputs = Inputs.model_validate({"images": {"scan": {"size": SIZE, "patch": PATCH, **image}}})
    tokenizer = Tokenizer.train(["nothing"], 300)
    spec = make_spec(inputs, store.schema, store.stats, tokenizer, store.windows(inputs.images))
    return Samples(store, inputs, spec, tokenizer, max_damaged=max_damaged)


def prepared(samples: Samples, rows, packed: bool = False) -> np.ndarray:
    """What the model is given of studies, [study, token, voxel of all channels]; of packed ones, one a row."""
    batch = samples.batch([samples.draw(row, None) for row in rows], samples.whole if packed else {})
    made = prepare(batch, samples.spec, None, None)
    if packed:
        return np.asarray(made.packed["scan"].patches)
    return np.asarray(as_patches(made.images["scan"], samples.spec.images["scan"]).patches)


def centred(volume: np.ndarray, fill: float) -> np.ndarray:
    """The centre of a volume as a crop of SIZE, in float64, `fill` where it sticks out."""
    out = np.full((*SIZE, volume.shape[3]), fill, np.float64)
    start = [(h - s) // 2 for h, s in zip(volume.shape, SIZE)]
    for at in np.ndindex(*SIZE):
        where = tuple(a + s for a, s in zip(at, start))
        if all(0 <= w < h for w, h in zip(where, volume.shape)):
            out[at] = volume[where]
    return out


def blocks(voxels: np.ndarray) -> np.ndarray:
    """A crop cut into patches, [token, voxel]."""
    corners = itertools.product(*(range(0, s, p) for s, p in zip(SIZE, PATCH)))
    return np.stack([voxels[tuple(slice(a, a + p) for a, p in zip(at, PATCH))].reshape(-1) for at in corners])


def head_like(rng: np.random.Generator, shape=None) -> np.ndarray:
    """Smooth tissue with noise in an ellipsoid, and zeros around it, as of an MRI without the skull."""
    shape = tuple(rng.integers(5, 20, 3).tolist()) if shape is None else shape
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, s) for s in shape), indexing="ij")
    tissue = 900 + 300 * np.sin(3 * z + rng.normal()) + 200 * y * x + rng.normal(0, 60, shape)
    return np.where(z**2 + y**2 + x**2 < 0.8, np.maximum(tissue, 1), 0).astype(np.int16)[..., None]


# ---------------------------------------------------------------- the limits of a volume


def percentile(values: list[float], share: float) -> float:
    """Between the two neighbours in order, written out."""
    ordered, at = sorted(values), share / 100 * (len(values) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])


@settings(max_examples=60)
@given(
    values=st.lists(st.integers(-2000, 3000), min_size=2, max_size=80).filter(lambda v: max(v) - min(v) > 1),
    low=st.floats(0, 40),
    high=st.floats(60, 100),
    broken=st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=3),
)
def test_limits_are_those_written_out_by_hand_and_what_is_not_finite_does_not_count(values, low, high, broken):
    sample = np.array([*values, *broken], np.float32)
    expected = percentile(values, low), percentile(values, high)
    if expected[1] - expected[0] > 1e-2:
        np.testing.assert_allclose(own_limits(sample, (low, high)), expected, rtol=1e-9, atol=1e-9)
    ways: list[tuple[ZScore, list]] = [
        ("zscore", values),
        ("zscore_foreground", [v for v in values if v > min(values)]),
    ]
    for kind, counted in ways:
        mean, sd = statistics.fmean(counted), statistics.pstdev(counted)
        if sd:
            np.testing.assert_allclose(own_limits(sample, kind), (mean - 4 * sd, mean + 4 * sd), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("kind", ["zscore", "zscore_foreground", (0.5, 99.5)])
@pytest.mark.parametrize("values", [[0], [7, 7, 7], [30000] * 5, [np.nan, np.nan], []])
def test_the_limits_of_a_volume_of_one_value_or_none_still_part(kind, values):
    low, high = np.array(own_limits(np.array(values, np.float32), kind), np.float32)
    assert np.isfinite([low, high]).all() and low < high
    assert not values or np.isnan(values[0]) or (values[0] - low) / (high - low) == 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_sample_stands_for_the_whole_volume(seed):
    """Of 40,000 to 250,000 voxels, all of them counted by numpy."""
    rng = np.random.default_rng(seed)
    volume = head_like(rng, tuple(rng.integers(36, 64, 3).tolist()))
    store = stored([volume])
    inside = volume[volume != 0].astype(np.float64)
    for kind, values in (("zscore", volume.astype(np.float64)), ("zscore_foreground", inside)):
        low, high = samples_of(store, normalise=kind).draw(0, None).boxes["scan"].limits or (0, 0)
        assert abs((low + high) / 2 - values.mean()) < 0.08 * values.std()  # four standard errors of 2,048 places
        assert abs((high - low) / 8 / values.std() - 1) < 0.1
    low, high = samples_of(store, normalise={"percentiles": (80, 99.5)}).draw(0, None).boxes["scan"].limits or (0, 0)
    assert abs((volume < low).mean() - 0.8) < 0.036 and abs((volume > high).mean() - 0.005) < 0.007


# ---------------------------------------------------------------- through the pipeline


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("channels", [1, 2])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), stacked=st.booleans(), count=st.integers(1, 3))
def test_each_window_is_a_channel_of_what_the_model_is_given(channels, packed, seed, stacked, count):
    rng = np.random.default_rng(seed)
    shapes = [SIZE if packed else (7, 10, 5) if stacked else tuple(rng.integers(4, 14, 3)) for _ in range(3)]
    volumes = [rng.integers(-1100, 1700, (*shape, channels)) for shape in shapes]
    windows = [WINDOWS[i] for i in rng.permutation(3)[:count]]
    samples = samples_of(stored(volumes, stacked), window=windows, **({"pack": PACK} if packed else {}))
    assert samples.spec.images["scan"].channels == channels * count
    found = prepared(samples, range(3), packed)
    for volume, tokens in zip(volumes, found, strict=True):
        crop = centred(volume, -5000)  # below every window
        each = [np.clip((crop[..., [c]] - lo) / (hi - lo), 0, 1) for c in range(channels) for lo, hi in windows]
        np.testing.assert_allclose(tokens, blocks(np.concatenate(each, -1)), atol=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=["zscore", "foreground", "percentiles"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), stacked=st.booleans())
def test_a_volume_is_normalised_by_its_whole_and_not_by_its_crop(kind, packed, seed, stacked):
    """By numpy, of the voxels at the sampled places; a study without the image stands between."""
    rng = np.random.default_rng(seed)
    shape = SIZE if packed else (12, 17, 15) if stacked else None
    volumes: list = [head_like(rng, shape), None, head_like(rng, shape), head_like(rng, shape)]
    samples = samples_of(stored(volumes, stacked), normalise=kind, **({"pack": PACK} if packed else {}))
    found = prepared(samples, range(4), packed)
    for volume, tokens in zip(volumes, found, strict=True):
        if volume is None:
            assert not tokens.any()
            continue
        z, y, x = places(volume.shape[:3]).T
        sample = volume[z, y, x, 0].astype(np.float64)
        if isinstance(kind, dict):
            low, high = np.quantile(sample, np.array(kind["percentiles"]) / 100)
            scaled = (centred(volume, low) - low) / (high - low)
        else:
            counted = sample[sample != 0] if kind == "zscore_foreground" else sample
            below = counted.mean() - 5 * counted.std()  # padding lies at the low end
            scaled = ((centred(volume, below) - counted.mean()) / counted.std() + 4) / 8
        np.testing.assert_allclose(tokens, blocks(np.clip(scaled, 0, 1)), atol=2e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=["zscore", "foreground", "percentiles"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.integers(1, 12), offset=st.integers(-9000, 9000))
def test_neither_gain_nor_offset_of_a_scanner_changes_what_the_model_is_given(kind, packed, seed, scale, offset):
    rng = np.random.default_rng(seed)
    volume = head_like(rng)
    samples = samples_of(
        stored([volume, volume * scale + offset]), normalise=kind, **({"pack": PACK} if packed else {})
    )
    plain, changed = prepared(samples, range(2), packed)
    assert len(np.unique(plain)) > 20
    np.testing.assert_allclose(changed, plain, atol=2e-4)  # float32 of values of 9,000 and a deviation of 100


def test_draws_are_those_of_a_fixed_window():
    """Crops lie where they lay, and the generator stands where it stood, whatever the window is."""
    rng = np.random.default_rng(0)
    store = stored([head_like(rng, (20, 22, 24)) for _ in range(4)])
    ways: tuple[dict, ...] = ({"window": (0, 1)}, {"window": WINDOWS}, *({"normalise": kind} for kind in KINDS))
    drawn = []
    for way in ways:
        generator = np.random.default_rng(7)
        samples = samples_of(store, crop="random", foreground={"share": 0.5}, **way)
        starts = [samples.draw(row, generator).boxes["scan"].start for row in (0, 1, 2, 3) * 5]
        drawn.append((starts, generator.bit_generator.state))
    assert len(set(drawn[0][0])) > 10 and all(found == drawn[0] for found in drawn)


def test_what_stands_for_the_limits_of_absent_volumes_reaches_nothing():
    samples = samples_of(stored([head_like(np.random.default_rng(0)), None]), normalise="zscore")
    batch = samples.batch([samples.draw(row, None) for row in range(2)], {})

    def with_limits(value: float) -> Batch:
        limits: Any = batch.images["scan"].limits
        limits[1] = value
        return prepare(batch, samples.spec, None, None)

    for value in (0.0, np.nan, np.inf):
        made = np.asarray(with_limits(value).images["scan"].voxels)
        assert np.isfinite(made).all() and made[0].any() and not made[1].any()


def test_pictures_show_the_first_window_or_that_of_the_volume():
    volume = head_like(np.random.default_rng(3), SIZE)
    for way, pack in itertools.product(({"window": WINDOWS}, {"normalise": "zscore"}), ({}, {"pack": PACK})):
        samples = samples_of(stored([volume]), **way, **pack)
        low, high = samples.draw(0, None).boxes["scan"].limits or WINDOWS[0]
        expected = np.clip((volume[SIZE[0] // 2] - low) / (high - low), 0, 1)
        np.testing.assert_allclose(middle_slice(samples, 0).pixels, expected, atol=1e-6)


@pytest.mark.parametrize("way", [{"window": WINDOWS}, {"normalise": "zscore"}], ids=["windows", "zscore"])
@pytest.mark.parametrize("pack", [{}, {"pack": PACK}], ids=["whole", "packed"])
def test_a_plan_has_the_shapes_of_the_pipeline(way, pack):
    samples = samples_of(stored([head_like(np.random.default_rng(i)) for i in range(4)]), **way, **pack)
    packed = {"scan": PackedShape(**PACK)} if pack else {}
    batch = samples.batch([samples.draw(row, None) for row in range(4)], packed)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), lower.batch_shapes(samples.spec, (), 4)) == shapes
    noise = measure.random_batch(samples.spec, (), 4)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), noise) == shapes
    made = prepare(noise, samples.spec, None, None)
    part = made.packed["scan"].patches if pack else made.images["scan"].voxels
    assert np.unique(np.asarray(part)).size > 20


# ---------------------------------------------------------------- what is refused or damaged


def test_a_damaged_sample_of_intensities_leaves_the_image_out(tmp_path):
    url, volumes = str(tmp_path / "store"), [head_like(np.random.default_rng(i)) for i in range(3)]
    schema = Schema(images={"scan": ImageSpec(dtype="int16", shape=None)})
    write_store(url, schema, [Study(f"p{i}", "train", {"scan": Image(v, (1, 1, 1))}) for i, v in enumerate(volumes)])
    store = StudyStore.open(url, cache_bytes=0)
    for path in (Path(url) / "intensities/scan/c").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: SAMPLED // 2])
    with pytest.warns(UserWarning, match="study 0 goes on without its image scan"):
        batch = samples_of(store, max_damaged=1, normalise="zscore").read(0, None)
    assert not batch.images["scan"].present and not np.asarray(batch.images["scan"].voxels).any()
    with pytest.raises(UserError, match="store"):
        samples_of(store, normalise="zscore").read(0, None)
    assert samples_of(store, window=(0, 1)).read(0, None).images["scan"].present


def test_a_store_without_samples_of_intensities_is_read_with_a_window_alone():
    store = stored([head_like(np.random.default_rng(0))])
    held = {name: of for name, of in store.file.files.items() if not name.startswith("intensities/")}
    store.file = store.file.model_copy(update={"files": held})
    with pytest.raises(UserError, match=r"inputs\.images\.scan\.normalise: memory.* holds no samples .* give a window"):
        samples_of(store, normalise="zscore")
    assert prepared(samples_of(store, window=(0, 1000)), [0]).any()


def test_images_of_several_channels_are_not_normalised_by_one_of_them():
    with pytest.raises(UserError, match=r"inputs\.images\.scan\.normalise: images of scan have 2 channels"):
        samples_of(stored([np.zeros((4, 4, 4, 2))]), normalise="zscore")


def test_inputs_saved_before_there_were_several_windows_are_read():
    old = {"size": [4, 4, 4], "patch": [2, 2, 2], "channels": 3, "window": [0, 255], "windows": [[0, 255], [-1, 1]]}
    shape = ImageShape.model_validate(old)
    assert (shape.window, shape.windows, shape.raw_channels) == ((0, 255), ((0, 255), (-1, 1)), 3)
    for way in ({"window": WINDOWS}, {"window": WINDOWS[:1]}, *({"normalise": kind} for kind in KINDS)):
        spec = samples_of(stored([head_like(np.random.default_rng(0))]), **way).spec
        assert InputSpec.model_validate_json(spec.model_dump_json()) == spec


IMAGE = {"size": [4, 8, 8], "patch": [2, 4, 4]}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({}, "an image has either a window"),
        ({"window": [0, 1], "normalise": "zscore"}, "an image has either a window"),
        ({"window": [[0, 1], [5, 5]]}, r"window \[5.0, 5.0\] is empty"),
        ({"window": []}, "window"),
        ({"normalise": {"percentiles": [90, 5]}}, "are not in order"),
        ({"normalise": "zscore", "pack": {"studies": 2, "tokens": 13, "trim": True}}, "set trim: false"),
    ],
)
def test_windows_that_cannot_be_are_errors_of_the_configuration(make_experiment, image, message):
    with pytest.raises(UserError, match=rf"inputs\.images\.ct.*{message}") as error:
        make_experiment({"inputs": {"images": {"ct": IMAGE | image}}})
    assert "\n" not in str(error.value)
