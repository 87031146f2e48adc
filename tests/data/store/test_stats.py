"""The fingerprint is that of the training studies alone, as numpy measures it."""

import numpy as np

from mmfm_jax.data.store import stats as store_stats
from mmfm_jax.data.store.stats import StatsBuilder
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, Schema, Study


def test_stats_are_of_the_train_split(store, studies):
    train = [s for s in studies if s.split == "train"]
    ages = np.array([s.row["age"] for s in train if "age" in s.row])
    stats = store.stats.numbers["age"]
    expected = [ages.mean(), ages.std(), ages.min(), ages.max()]
    np.testing.assert_allclose([stats.mean, stats.sd, stats.low, stats.high], expected)
    assert stats.missing == len(train) - len(ages)
    sexes = [s.row.get("sex") for s in train]
    assert store.stats.categories["sex"].counts == {"female": sexes.count("female"), "male": sexes.count("male")}
    assert store.stats.categories["sex"].missing == sexes.count(None)
    reports = [text for s in train for text in s.texts.get("report", ())]
    assert store.stats.texts["report"].studies == sum("report" in s.texts for s in train)
    np.testing.assert_allclose(store.stats.texts["report"].words_mean, np.mean([len(t.split()) for t in reports]))
    images = [s.images["nodule"] for s in train if "nodule" in s.images]
    held = store.stats.images["nodule"]
    assert held.volumes == len(images)
    voxels = np.concatenate([image.voxels.ravel() for image in images])
    np.testing.assert_allclose(held.percentiles["95"], np.percentile(voxels, 95))
    np.testing.assert_allclose(held.spacing_mm_median, np.median([image.spacing_mm for image in images], axis=0))


def test_voxels_of_classes_are_those_of_the_train_split(store, studies):
    train = [s for s in studies if s.split == "train"]
    for name, spec in store.schema.masks.items():
        masks = [s.masks[name] for s in train if name in s.masks]
        held = store.stats.masks[name]
        assert held.masks == len(masks)
        for value, label in enumerate(spec.classes, 1):
            counts = [int((mask == value).sum()) for mask in masks]
            assert (held.voxels[label], held.volumes[label]) == (sum(counts), sum(n > 0 for n in counts))


def test_a_sample_of_many_volumes_is_even_and_bounded(monkeypatch):
    """Volume i holds the value i: the percentiles of an even sample are those of 0 ... n."""
    monkeypatch.setattr(store_stats, "_SAMPLED_VOLUMES", 64)
    builder = StatsBuilder(Schema(images={"ct": ImageSpec(dtype="int16", shape=(2, 2, 2))}))
    for i in range(1001):
        builder.add(Study("p", "train", {"ct": Image(np.full((2, 2, 2, 1), i, np.int16), (1.0, 1.0, 1.0))}))
    assert len(builder._images["ct"].voxels) <= 64
    stats = builder.build().images["ct"]
    assert stats.volumes == 1001
    np.testing.assert_allclose([stats.percentiles[p] for p in ("5", "50", "95")], [50, 500, 950], atol=32)


def test_a_column_that_no_study_has_normalises_nothing():
    stats = StatsBuilder(Schema(columns={"age": ColumnSpec(kind="number")})).build().numbers["age"]
    assert (stats.mean, stats.sd, stats.missing) == (0.0, 1.0, 0)
