"""A damaged image counts as absent, up to a limit: every other study, and all else of its own, are as they were."""

import dataclasses
import itertools
import pickle
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from mmfm_jax.config.inputs import Inputs
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.study_store import DamagedImage, StudyStore
from mmfm_jax.errors import UserError

SIZE = {"size": [4, 4, 4], "patch": [2, 2, 2]}
IMAGES = {
    "nodule": SIZE | {"window": [0, 255]},
    "photo": {"size": [1, 8, 6], "patch": [1, 4, 2], "window": [0, 255]},
    "ct": SIZE | {"window": [-1000, 1000], "crop": "random"},
}
PACKED = {"ct": IMAGES["ct"] | {"pack": {"studies": 2, "tokens": 16}}}


def samples_of(url: str, images: dict, max_damaged: int) -> Samples:
    store = StudyStore.open(url, cache_bytes=0)
    inputs = Inputs.model_validate({"images": images, "texts": {"report": {"length": 8}}, "columns": ["age"]})
    tokenizer = Tokenizer.train(["as read by nobody"], 300)
    spec = make_spec(inputs, store.schema, store.stats, tokenizer)
    return Samples(store, inputs, spec, tokenizer, max_damaged=max_damaged)


def batches(samples: Samples, steps: int = 4) -> list:
    taken = local_batches(training_rows(samples, "train", 3), 8, np.arange(8), 0, 2, 2, samples.packed)
    try:
        return list(itertools.islice(taken, steps))
    finally:
        taken.close()


def spoil(store: StudyStore, role: str, row: int) -> None:
    """The chunks of one study of a role with an array a study; of a stacked role its one shard, cut short."""
    folder = Path(store.url) / "volumes" / role
    folder = folder / "0/c" if store.schema.images[role].shape else folder / f"{row:08d}/0/c"
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def held(store: StudyStore, studies: list, role: str) -> list[int]:
    return [row for row in store.rows("train").tolist() if role in studies[row].images]


@pytest.mark.parametrize("images", [IMAGES, PACKED], ids=["unpacked", "packed"])
def test_a_damaged_image_is_absent_and_all_else_is_as_it_was(store, studies, images):
    before = batches(samples_of(store.url, images, 1))
    bad = held(store, studies, "ct")[0]
    spoil(store, "ct", bad)
    samples = samples_of(store.url, images, 1)
    with pytest.warns(UserWarning, match=f"study {bad} goes on without its image ct") as told:
        after = batches(samples)
    assert len(told) == len(samples.damage) == 1 and "patient" not in str(told[0].message)
    met = 0
    for old, new in zip(before, after):
        assert old.study.tolist() == new.study.tolist()
        for at, row in enumerate(old.study.tolist()):
            parts = [dataclasses.replace(batch, images={}, packed={}) for batch in (old, new)]
            jax.tree.map(lambda a, b, at=at: np.testing.assert_array_equal(a[at], b[at]), *parts)
            met += row == bad
            if images is PACKED:
                ours = new.packed["ct"].present[at]
                assert ours == (old.packed["ct"].present[at] and row != bad)
                continue
            for role in images:
                was, now = old.images[role], new.images[role]
                if (role, row) == ("ct", bad):
                    assert was.present[at] and not now.present[at]
                    assert not now.voxels[at].any() and not now.spacing_mm[at].any()
                else:
                    jax.tree.map(lambda a, b, at=at: np.testing.assert_array_equal(a[at], b[at]), was, now)
    assert met


def test_of_images_that_are_read_together_only_the_damaged_are_left_out(store, studies):
    """A stacked role whose shard is cut short: what still can be read is there."""
    before = batches(samples_of(store.url, IMAGES, 0))
    spoil(store, "nodule", 0)
    readable = set()
    for row in held(store, studies, "nodule"):
        try:
            StudyStore.open(store.url, cache_bytes=0).crop("nodule", row, (1, 0, 0), (4, 4, 4))
            readable.add(row)
        except DamagedImage:
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = batches(samples_of(store.url, IMAGES, 40))
    for old, new in zip(before, after):
        for at, row in enumerate(old.study.tolist()):
            expected = old.images["nodule"].present[at] and row in readable
            assert new.images["nodule"].present[at] == expected
            if expected:
                np.testing.assert_array_equal(new.images["nodule"].voxels[at], old.images["nodule"].voxels[at])


@pytest.mark.parametrize("images", [IMAGES, PACKED], ids=["unpacked", "packed"])
def test_one_damaged_image_too_many_is_an_error_that_tells_the_limit(store, studies, images):
    for row in held(store, studies, "ct")[:3]:
        spoil(store, "ct", row)
    with pytest.raises(UserError, match=r"ct/.*it is image 3 .* data\.max_damaged allows 2"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches(samples_of(store.url, images, 2))
    with pytest.raises(DamagedImage, match="a chunk of study"):
        batches(samples_of(store.url, images, 0))


def test_each_process_counts_its_own(store, studies):
    spoil(store, "ct", held(store, studies, "ct")[0])
    samples = samples_of(store.url, IMAGES, 5)
    with pytest.warns(UserWarning, match="goes on without"):
        batches(samples)
    assert len(samples.damage) == 1
    copied = pickle.loads(pickle.dumps(samples.damage))
    assert copied.limit == 5 and not len(copied)
