"""A share of the crops is centred on the foreground or on a class, from samples that the store keeps."""

import json
import uuid
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfm_jax.config.inputs import Inputs
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.foreground import SAMPLED, intensities, otsu, places
from mmfm_jax.data.store.format import open_kvstore
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import Image, ImageSpec, MaskSpec, Schema, Study
from mmfm_jax.errors import UserError

SIZE = (8, 10, 12)
SCHEMA = Schema(
    images={"ct": ImageSpec(dtype="int16", shape=None, channels=2)},
    masks={"organ": MaskSpec(image="ct", classes=("liver", "spleen", "tumour"))},
)
STUDIES = 6


def studies() -> list[Study]:
    """Air at -1000 with a body of a fiftieth of the volume in one channel, and a mask; the last has neither."""
    rng, made = np.random.default_rng(0), []
    for i in range(STUDIES):
        shape = tuple(int(s) for s in rng.integers(30, 50, 3))
        voxels = rng.normal(-1000, 20, (*shape, 2))
        mask = np.zeros(shape, np.uint8)
        at = [int(rng.integers(0, s - 12)) for s in shape]
        body = tuple(slice(a, a + 12) for a in at)
        if i < STUDIES - 1:
            voxels[(*body, 1)] = rng.normal(50, 30, (12, 12, 12))
            mask[0, 0, 0], mask[body] = 1, 3  # a tumour of 1,728 voxels, one voxel of liver in a corner, no spleen
        image = Image(voxels.astype(np.int16), (2.0, 1.0, 1.0))
        made.append(Study(f"p{i}", "train", {"ct": image}, masks={"organ": mask} if mask.any() else {}))
    return made


@pytest.fixture(scope="module")
def store() -> StudyStore:
    url = f"memory://foreground/{uuid.uuid4()}"
    write_store(url, SCHEMA, studies())
    return StudyStore.open(url)


def samples_of(store: StudyStore, **foreground) -> Samples:
    image = {"size": SIZE, "patch": (2, 2, 2), "window": (-1000, 400), "crop": "random", "foreground": foreground}
    inputs = Inputs.model_validate({"images": {"ct": image}})
    tokenizer = Tokenizer.train(["nothing"], 300)
    return Samples(store, inputs, make_spec(inputs, store.schema, store.stats, tokenizer), tokenizer)


def drawn(samples: Samples, row: int, n: int, seed: int = 0) -> list[tuple[int, int, int]]:
    rng = np.random.default_rng(seed)
    return [samples.draw(row, rng).boxes["ct"].start for _ in range(n)]


def holds(start, wanted: np.ndarray) -> bool:
    """Whether a crop has a voxel that is wanted."""
    return bool(wanted[tuple(slice(a, a + s) for a, s in zip(start, SIZE))].any())


# ---------------------------------------------------------------- samples


@given(shape=st.tuples(*[st.integers(1, 300)] * 3))
def test_places_are_within_the_volume_and_in_every_eighth_of_it_alike(shape):
    at = places(shape)
    assert at.shape == (SAMPLED, 3) and (at >= 0).all() and (at < shape).all()
    if min(shape) >= 64:
        octant = (2 * at // shape) @ [4, 2, 1]
        counts = np.bincount(octant, minlength=8).reshape(2, 2, 2)
        halves = [((size + 1) // 2 / size, size // 2 / size) for size in shape]  # an odd axis has no equal ones
        expected = SAMPLED * np.einsum("i,j,k->ijk", *halves)
        assert abs(counts - expected).max() < 0.15 * SAMPLED / 8


def test_intensities_are_those_at_the_places():
    voxels = np.random.default_rng(0).integers(-1000, 1000, (7, 9, 11, 3)).astype(np.int16)
    expected = [max(voxels[z, y, x, c] for c in range(3)) for z, y, x in places((7, 9, 11))]
    assert intensities(voxels).tolist() == expected and intensities(voxels).dtype == np.int16


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 0.95), gap=st.floats(1, 5000), low=st.floats(-3000, 3000))
def test_the_threshold_parts_two_kinds_of_voxels_as_trying_every_one_does(seed, share, gap, low):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(500) < share, low, low + gap) + rng.normal(0, gap / 20, 500)
    clipped = np.clip(values, *np.percentile(values, (0.5, 99.5)))
    found = otsu(values)

    def between(threshold):
        one, other = clipped[clipped < threshold], clipped[clipped >= threshold]
        return len(one) * len(other) * (one.mean() - other.mean()) ** 2 if len(one) and len(other) else 0.0

    best = max(between(t) for t in np.unique(clipped))
    assert between(found) > 0.995 * best
    assert np.mean((values > found) == (values > low + gap / 2)) > 0.99


def test_the_threshold_of_one_value_is_that_value():
    assert otsu(np.full(9, 3.0)) == 3.0


def test_the_store_finds_the_foreground_without_reading_a_volume(store):
    threshold = store.stats.images["ct"].foreground_above
    assert -900 < threshold < -50
    kvstore = open_kvstore(store.url)
    for row, study in enumerate(studies()):
        brightest = study.images["ct"].voxels.max(-1)
        for above in (None, 60.0, -1010.0):
            limit = threshold if above is None else above
            expected = [at for at in places(brightest.shape).tolist() if brightest[tuple(at)] > limit]
            assert store.foreground("ct", row, above).tolist() == expected
        assert (len(store.foreground("ct", row)) > 10) == (row < STUDIES - 1)
    largest = max(len(kvstore.read(key).result().value) for key in kvstore.list().result() if b"intensities" in key)
    assert largest <= STUDIES * (2 * SAMPLED + 64) + 16 * 1024 + 64  # and an index of 1,024 studies


# ---------------------------------------------------------------- crops


@pytest.mark.parametrize("row", range(STUDIES))
def test_a_share_of_the_crops_holds_foreground_and_the_others_are_anywhere(store, row):
    brightest = studies()[row].images["ct"].voxels.max(-1) > store.stats.images["ct"].foreground_above
    anywhere, all_on, third = (drawn(samples_of(store, share=s), row, 300) for s in (0.0, 1.0, 0.33))
    for starts in (anywhere, all_on, third):
        assert all(0 <= a <= h - s for start in starts for a, h, s in zip(start, brightest.shape, SIZE))
    if row == STUDIES - 1:  # has none: anywhere
        assert len(set(all_on)) > 250
        return
    by_chance = np.mean([holds(start, brightest) for start in drawn(samples_of(store, share=0.0), row, 2000, 1)])
    assert all(holds(start, brightest) for start in all_on) and by_chance < 0.6
    assert abs(np.mean([holds(s, brightest) for s in third]) - (0.33 + 0.67 * by_chance)) < 0.1
    room = np.subtract(brightest.shape, SIZE)
    centred = {tuple(np.clip(at - np.floor_divide(SIZE, 2), 0, room).tolist()) for at in store.foreground("ct", row)}
    assert set(all_on) <= centred and len(set(all_on)) > 0.9 * len(centred)


def test_classes_that_a_study_holds_come_equally_often_however_large(store):
    row, mask = 0, studies()[0].masks["organ"]
    samples = samples_of(store, share=1.0, mask="organ")
    starts = drawn(samples, row, 400)
    on = Counter((holds(s, mask == 1), holds(s, mask == 3)) for s in starts)
    assert sum(on.values()) == sum(n for (liver, tumour), n in on.items() if liver or tumour)
    assert 0.4 < sum(n for (liver, _), n in on.items() if liver) / 400 < 0.65
    without = drawn(samples, STUDIES - 1, 300)  # no mask: anywhere
    assert len(set(without)) > 250


def test_without_a_share_crops_are_what_they_were(store):
    image = {"size": SIZE, "patch": (2, 2, 2), "window": (-1000, 400), "crop": "random"}
    inputs = Inputs.model_validate({"images": {"ct": image}})
    plain = Samples(store, inputs, samples_of(store).spec, samples_of(store).tokenizer)
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    held = studies()[0].images["ct"].voxels.shape
    for _ in range(20):
        expected = tuple(int(again.integers(h - s + 1)) for h, s in zip(held, SIZE))
        assert plain.draw(0, rng).boxes["ct"].start == expected


# ---------------------------------------------------------------- errors


def test_a_mask_that_the_store_lacks_is_named(store):
    with pytest.raises(
        UserError, match=r"images\.ct\.foreground\.mask: the store has no mask vessel of ct; it has organ"
    ):
        samples_of(store, mask="vessel")


def test_a_store_of_an_earlier_release_is_told_from_one_with_samples(tmp_path):
    url = str(tmp_path / "store")
    write_store(url, SCHEMA, studies()[:2])
    held = json.loads((tmp_path / "store/store.json").read_text())
    held["files"] = {name: of for name, of in held["files"].items() if not name.startswith("intensities/")}
    (tmp_path / "store/store.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match=r"foreground: .* holds no samples of the intensities of ct"):
        samples_of(StudyStore.open(url))
    assert samples_of(StudyStore.open(url), mask="organ")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"foreground": {"share": 0.5}}, "foreground is of random crops; set crop: random"),
        ({"crop": "random", "foreground": {"mask": "organ", "above": 3}}, "leave one of them out"),
        ({"crop": "random", "foreground": {"share": 1.5}}, "share: is 1.5; give a number from 0 to 1"),
    ],
)
def test_a_foreground_that_cannot_be_is_an_error_of_the_configuration(make_experiment, image, message):
    inputs = {"images": {"ct": {"size": [4, 8, 8], "patch": [2, 4, 4], "window": [0, 255], **image}}}
    with pytest.raises(UserError, match=message):
        make_experiment({"inputs": inputs})
