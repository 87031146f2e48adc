"""Counts and sampled positions of a mask are those of plain numpy, even over the volume, and the mask's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.data.store import masks
from mmfm_jax.data.store.masks import POSITIONS, summarise


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(1, 5), most=st.sampled_from([1, 20, 400]))
def test_positions_are_distinct_voxels_of_the_class(seed, classes, most):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(classes + 1, 0.3))
    mask = rng.choice(classes + 1, rng.integers(1, 12, 3), p=shares).astype(np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "POSITIONS", most)
        summary = summarise(mask, classes)
    for index in range(classes):
        everywhere = np.argwhere(mask == index + 1)
        held = summary.positions[index, : min(most, len(everywhere))]
        assert summary.voxels[index] == len(everywhere)
        flat = np.ravel_multi_index(tuple(held.T), mask.shape)
        assert (np.diff(flat) > 0).all() and np.isin(flat, np.ravel_multi_index(tuple(everywhere.T), mask.shape)).all()
        if len(everywhere) <= most:
            np.testing.assert_array_equal(held, everywhere)
        assert not summary.positions[index, len(held) :].any()


def test_every_voxel_of_a_class_is_as_likely():
    """Over many masks that differ in a corner, the counts by place are those of a uniform draw (chi-square)."""
    rng = np.random.default_rng()
    inside = np.zeros((4, 10, 10), bool)
    inside[:, 2:8, 2:8] = rng.random((4, 6, 6)) < 0.7
    drawn = np.zeros(inside.shape)
    rounds, most = 600, 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "POSITIONS", most)
        for number in range(rounds):
            mask = inside.astype(np.uint8)
            mask[0, 0, :10] = 2 * np.array([int(bit) for bit in f"{number:010b}"])  # another class: another draw
            z, y, x = summarise(mask, 2).positions[0].T
            np.add.at(drawn, (z, y, x), 1)
    assert drawn.sum() == rounds * most and not drawn[~inside].any()
    expected = rounds * most / inside.sum()
    chi2 = ((drawn[inside] - expected) ** 2 / expected).sum()  # less than its degrees of freedom: without replacement
    assert chi2 < inside.sum() + 6 * np.sqrt(2 * inside.sum())


def test_the_same_voxels_give_the_same_positions_wherever_they_stand():
    mask = np.random.default_rng().integers(0, 3, (20, 30, 40), np.uint8)
    first, again = summarise(mask, 2), summarise(np.asfortranarray(mask), 2)
    np.testing.assert_array_equal(first.positions, again.positions)
    assert (first.voxels > POSITIONS).all()
    mask[0, 0, 0] = (mask[0, 0, 0] + 1) % 3
    assert not np.array_equal(summarise(mask, 2).positions, first.positions)
