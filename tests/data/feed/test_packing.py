"""Images of unequal size as rows of tokens: nothing is lost but what does not fit, and every patch is where it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.config.data import Augment
from mmfm_jax.config.inputs import Inputs
from mmfm_jax.data.batch import ImagePart, ImageShape, PackedPart, PackedShape
from mmfm_jax.data.feed import packing
from mmfm_jax.data.feed.augment import augment_images
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import batch_checksum, evaluation_batches, local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store

SHAPE = ImageShape(size=(8, 12, 10), patch=(2, 3, 5), channels=2, window=(0, 200))
GRIDS = st.lists(st.tuples(*[st.integers(1, 7)] * 3) | st.just((0, 0, 0)), min_size=1, max_size=6)


def grid_of(rng, grid, fill=None) -> PackedPart:
    """A grid of patches of noise, each of whose centres is its index."""
    voxels = rng.integers(1, 255, (*(g * p for g, p in zip(grid, SHAPE.patch)), 2)).astype(np.uint8)
    if fill is not None:
        voxels[:] = fill
    return packing.cut(voxels, (1.0, 0.5, 2.0), SHAPE, trim=False)


def test_patches_are_the_blocks_of_the_crop_and_know_their_places():
    rng = np.random.default_rng(0)
    voxels, spacing = rng.integers(0, 255, (6, 9, 5, 2)).astype(np.uint8), np.array([2.0, 0.7, 1.1])
    part = packing.cut(voxels, list(spacing), SHAPE, trim=False)
    assert part.patches.shape == (3, 3, 1, 2 * 3 * 5 * 2) and part.patches.dtype == np.uint8
    middle = (np.array(voxels.shape[:3]) - 1) / 2
    for z, y, x in np.ndindex(3, 3, 1):
        block = voxels[2 * z : 2 * z + 2, 3 * y : 3 * y + 3, 5 * x : 5 * x + 5]
        np.testing.assert_array_equal(part.patches[z, y, x], block.reshape(-1))
        centre = np.array([2 * z + 0.5, 3 * y + 1, 5 * x + 2]) - middle
        np.testing.assert_allclose(part.centres_mm[z, y, x], centre * spacing, rtol=1e-6)
    np.testing.assert_array_equal(packing.volume(part, SHAPE), voxels)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), low=st.integers(0, 200))
def test_trimming_leaves_out_empty_borders_and_no_more(seed, low):
    rng = np.random.default_rng(seed)
    voxels = np.full((8, 12, 10, 2), low, np.uint8)
    for at in rng.integers(0, (8, 12, 10, 2), (int(rng.integers(4)), 4)):
        voxels[tuple(at)] = 255
    shape = SHAPE.model_copy(update={"window": (float(low), 255.0)})
    whole, kept = (packing.cut(voxels, (1.0, 1.0, 1.0), shape, trim) for trim in (False, True))
    full = {tuple(c) for c, v in zip(whole.centres_mm.reshape(-1, 3), whole.patches.reshape(-1, 60)) if (v > low).any()}
    by_place = {tuple(c): v for c, v in zip(kept.centres_mm.reshape(-1, 3), kept.patches.reshape(-1, 60))}
    assert full <= set(by_place)
    for c, v in zip(whole.centres_mm.reshape(-1, 3), whole.patches.reshape(-1, 60)):
        np.testing.assert_array_equal(by_place.get(tuple(c), v), v)
    if not full:
        assert kept.patches.shape[:3] == (1, 1, 1)
    for axis in range(3) if full else ():  # each face of the box touches something
        for end in (0, -1):
            assert (np.take(kept.patches, end, axis) > low).any()


@settings(max_examples=100)
@given(grids=GRIDS, share=st.floats(0, 1))
def test_what_does_not_fit_is_taken_from_the_largest(grids, share):
    sizes = np.array([np.prod(g) for g in grids])
    tokens = len(grids) + int(share * sizes.sum())
    got = packing.fit(grids, tokens)
    left = np.array([np.prod(g) for g in got])
    assert left.sum() <= tokens
    assert all(a <= b for g, h in zip(got, grids) for a, b in zip(g, h))
    assert ((left > 0) == (sizes > 0)).all()
    if sizes.sum() <= tokens:
        assert got == grids
    for g, before, n in zip(got, sizes, left):
        if n < before:  # with one more layer it was the largest, and there was no room for it
            layered = max(n + n // axis for axis in g)
            assert layered >= left.max()


@settings(max_examples=30)
@given(grids=GRIDS, seed=st.integers(0, 2**32 - 1), room=st.integers(0, 60))
def test_a_row_holds_of_each_study_whole_patches_in_their_places_and_zeros_else(grids, seed, room):
    rng = np.random.default_rng(seed)
    parts = [packing.nothing(SHAPE, "uint8") if not np.prod(g) else grid_of(rng, g) for g in grids]
    tokens = len(grids) + room
    row = packing.pack(parts, len(parts), tokens)
    assert row.patches.shape == (1, tokens, 60) and row.patches.dtype == np.uint8 and row.studies == len(parts)
    np.testing.assert_array_equal(row.present, [np.prod(g) > 0 for g in grids])
    segment = np.asarray(row.segment)[0]
    filled = segment[segment > 0]
    assert (np.diff(filled) >= 0).all() and not segment[len(filled) :].any()
    assert not np.asarray(row.patches)[0, len(filled) :].any()
    for place, (part, grid) in enumerate(zip(parts, packing.fit(grids, tokens)), start=1):
        mine = segment == place
        assert mine.sum() == np.prod(grid)
        held = {tuple(c): v for c, v in zip(part.centres_mm.reshape(-1, 3), np.asarray(part.patches).reshape(-1, 60))}
        for c, v in zip(row.centres_mm[0][mine], row.patches[0][mine]):
            np.testing.assert_array_equal(held[tuple(c)], v)


# ---------------------------------------------------------------- from a store

INPUTS = {
    "images": {
        "ct": {"size": [24, 32, 32], "patch": [8, 8, 8], "window": [0, 30000], "crop": "random",
               "pack": {"studies": 4, "tokens": 60}},
        "nodule": {"size": [6, 5, 4], "patch": [3, 5, 2], "window": [0, 255]},
    },
    "texts": {"report": {"length": 6}},
}  # fmt: skip
SIZE = 8


@pytest.fixture(scope="module")
def samples(tmp_path_factory, schema, make_studies):
    url = str(tmp_path_factory.mktemp("packing") / "store")
    write_store(url, schema, make_studies(40, seed=3, present=0.8))
    store, inputs = StudyStore.open(url), Inputs.model_validate(INPUTS)
    tokenizer = Tokenizer.train(store.texts(store.rows("train")), 300)
    return Samples(store, inputs, make_spec(inputs, store.schema, store.stats, tokenizer), tokenizer)


def global_batch(samples, step, threads, processes):
    """The batch of a step, joined from what each process reads."""
    parts = []
    for rows in np.split(np.arange(SIZE), processes):
        order = training_rows(samples, "train", 5)
        batches = local_batches(order, SIZE, rows, step, threads, 1, samples.packed)
        parts.append(next(batches))
        batches.close()
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def test_packed_batches_depend_on_seed_and_step_alone(samples):
    whole = global_batch(samples, 3, threads=4, processes=1)
    assert whole.packed["ct"].patches.shape == (2, 60, 512) and set(whole.images) == {"nodule"}
    assert batch_checksum(global_batch(samples, 3, threads=1, processes=2)) == batch_checksum(whole)
    assert batch_checksum(global_batch(samples, 4, threads=1, processes=2)) != batch_checksum(whole)


def test_tokens_hold_the_voxels_of_their_study_at_their_place(samples):
    """Read again from the store, a voxel at a time."""
    padding = 0
    for step in range(3):
        batch = global_batch(samples, step, threads=1, processes=1)
        part = batch.packed["ct"]
        padding += (np.asarray(part.segment) == 0).sum()
        for i, row in enumerate(batch.study):
            info = samples.store.volume_info("ct", row)
            mine = np.asarray(part.segment)[i // 4] == 1 + i % 4
            assert part.present[i] == (info is not None) == mine.any()
            if info is None:
                continue
            volume = samples.store.crop("ct", row, (0, 0, 0), info[0])[..., 0]
            padded = np.pad(volume, 8)  # the low end of the window, as padding of a crop is
            windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8, 8))
            index = np.round(part.centres_mm[i // 4][mine] / np.array(info[1]) / 4)  # in half patches, from the centre
            patches = part.patches[i // 4][mine].reshape(-1, 8, 8, 8)
            at = np.argwhere((windows == patches[0]).all(axis=(3, 4, 5)))
            assert len(at) == 1
            for patch, moved in zip(patches, 4 * (index - index[0])):
                np.testing.assert_array_equal(windows[tuple((at[0] + moved).astype(int))], patch)
    assert padding > 0


def test_an_evaluated_study_is_whole_and_does_not_depend_on_its_neighbours(samples):
    few, many = (list(evaluation_batches(samples, "test", size, np.arange(size), threads=2)) for size in (2, 8))
    for batches in (few, many):
        part = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(batch.packed["ct"] for batch in batches))
        assert part.patches.shape[1] == 3 * 4 * 4 and part.studies == 1
    rows = np.concatenate([batch.study for batch in few])
    for batch in many:
        for i in np.flatnonzero(batch.study >= 0):
            step, at = divmod(int(np.flatnonzero(rows == batch.study[i])[0]), 2)
            jax.tree.map(
                lambda a, b, at=at, i=i: np.testing.assert_array_equal(a[at], b[i]),
                few[step].packed, batch.packed,
            )  # fmt: skip


# ---------------------------------------------------------------- on the device


def images_and_packed(seed, studies=4):
    """Whole images, and the same packed two a row; raw."""
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 256, (studies, *SHAPE.size, 2)).astype(np.uint8)
    spacing = rng.uniform(0.5, 2, (studies, 3)).astype(np.float32)
    present = np.arange(studies) != 1
    grids = [
        packing.cut(v, list(s), SHAPE, trim=False) if p else packing.nothing(SHAPE, "uint8")
        for v, s, p in zip(voxels, spacing, present)
    ]
    return ImagePart(voxels, spacing, present), packing.pack(grids, 2, 2 * 4 * 4 * 2 + 5)


def test_packed_images_are_augmented_as_whole_ones_are(samples):
    image, packed = images_and_packed(0)
    config, key = Augment(flip=0.5, intensity=0.3), jax.random.key(1)
    spec = samples.spec.model_copy(update={"images": {"ct": SHAPE}})
    some = samples.batch([samples.absent()] * 4, samples.packed)
    whole = prepare(dataclasses.replace(some, images={"ct": image}, packed={}), spec, config, key).images["ct"]
    got = prepare(dataclasses.replace(some, images={}, packed={"ct": packed}), spec, config, key).packed["ct"]
    again = augment_images(prepare_only(some, spec, image), config, jax.random.fold_in(key, 0))
    np.testing.assert_allclose(whole.voxels, again.voxels)
    changed = 0
    for i in np.flatnonzero(image.present):
        grid = packing.cut(np.asarray(whole.voxels[i]), list(image.spacing_mm[i]), SHAPE, trim=False)
        held = {tuple(np.round(c, 3)): v for c, v in zip(grid.centres_mm.reshape(-1, 3), grid.patches.reshape(-1, 60))}
        mine = np.asarray(got.segment)[i // 2] == 1 + i % 2
        assert mine.sum() == len(held)
        for c, v in zip(np.asarray(got.centres_mm)[i // 2][mine], np.asarray(got.patches)[i // 2][mine]):
            np.testing.assert_allclose(held[tuple(np.round(c + 0.0, 3))], v, atol=1e-6)
        plain = np.clip(image.voxels[i] / 200, 0, 1)
        changed += np.abs(np.asarray(whole.voxels[i]) - plain).max() > 0.01
    assert changed == 3
    assert not np.asarray(got.patches)[np.asarray(got.segment) == 0].any()


def prepare_only(batch, spec, image):
    return prepare(dataclasses.replace(batch, images={"ct": image}, packed={}), spec, None, None).images["ct"]


def test_what_stands_in_padding_is_gone_once_prepared(samples):
    _, packed = images_and_packed(1)
    spec = samples.spec.model_copy(update={"images": {"ct": SHAPE}})
    some = samples.batch([samples.absent()] * 4, samples.packed)
    padding = np.asarray(packed.segment)[..., None] == 0
    assert padding.any()

    def prepared(value):
        spoilt = dataclasses.replace(
            packed,
            patches=np.where(padding, value, packed.patches).astype(np.float32),
            centres_mm=np.where(padding, value, packed.centres_mm),
        )
        batch = dataclasses.replace(some, images={}, packed={"ct": spoilt})
        return prepare(batch, spec, Augment(flip=0.5, intensity=0.2), jax.random.key(0)).packed["ct"]

    for value in (np.nan, 1e30):
        jax.tree.map(np.testing.assert_array_equal, prepared(value), prepared(0.0))


def test_a_study_marked_absent_has_no_tokens(samples):
    _, packed = images_and_packed(2)
    absent = dataclasses.replace(packed, present=np.zeros(4, bool))
    spec = samples.spec.model_copy(update={"images": {"ct": SHAPE}})
    some = samples.batch([samples.absent()] * 4, samples.packed)
    got = prepare(dataclasses.replace(some, images={}, packed={"ct": absent}), spec, None, None).packed["ct"]
    assert not np.asarray(got.segment).any() and not np.asarray(got.patches).any()


def test_by_token_gives_each_token_what_its_study_has():
    _, packed = images_and_packed(3)
    values = jnp.arange(8.0).reshape(4, 2)
    got = np.asarray(packed.by_token(values))
    for row, token in np.argwhere(np.asarray(packed.segment) > 0):
        np.testing.assert_array_equal(got[row, token], values[2 * row + np.asarray(packed.segment)[row, token] - 1])


def test_how_evaluation_packs_has_room_for_the_largest_crop(samples):
    assert samples.packed == {"ct": PackedShape(studies=4, tokens=60)}
    assert samples.whole == {"ct": PackedShape(studies=1, tokens=48)}
