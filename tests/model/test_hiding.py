"""How much of an image is hidden, and that what is shown and what is hidden of packed images always fits."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfm_jax.config.hiding import buffers, granule, hidden_of
from mmfm_jax.data.batch import PackedPart
from mmfm_jax.model.hiding import hide

SHARES = (0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 0.95, 1.0)


@pytest.mark.parametrize("share", SHARES)
def test_buffers_hold_any_images_that_fit_a_row_and_little_more(share):
    """By trying all images of up to 7 patches."""
    for studies, most in itertools.product((1, 2, 3, 5), (1, 2, 5, 7)):
        every = np.array(list(itertools.combinations_with_replacement(range(most + 1), studies)))
        hidden = np.array([hidden_of(n, share) for n in range(most + 1)])[every].sum(axis=1)
        patches = every.sum(axis=1)
        for tokens in range(studies, studies * most + 2):
            fits = patches <= tokens
            for held, count in zip(buffers(tokens, studies, share, most), (patches - hidden, hidden)):
                needed = count[fits].max()
                assert needed <= held <= min(needed + studies, tokens), (studies, most, tokens)


@given(st.integers(2, 300_000), st.floats(0, 1))
def test_a_share_is_kept_to_a_512th_and_something_is_shown_and_hidden(patches, share):
    hidden, step = hidden_of(patches, share), granule(patches)
    assert 1 <= hidden < patches
    assert (patches - hidden) % step == 0
    assert abs(hidden - share * patches) <= max(1, patches / 512 if step == 1 else step) + 0.5
    assert step == 1 or step <= patches / 256
    assert patches < 512 or step > 1


def test_what_is_shown_of_a_long_volume_divides_over_a_ring_at_any_share():
    for share in np.random.default_rng().uniform(0, 1, 50):
        assert (131_072 - hidden_of(131_072, share)) % 128 == 0 == hidden_of(131_072, share) % 128


@pytest.mark.parametrize("sizes", [(1,) * 8, (1,) * 7 + (13,), (2,) * 8, (0, 1, 1, 1, 1, 3, 3, 11)], ids=str)
def test_every_patch_of_eight_images_a_row_is_shown_or_hidden(sizes):
    tokens = max(sum(sizes), 8)
    segment = np.zeros((1, tokens), np.int32)
    segment[0, : sum(sizes)] = np.repeat(1 + np.arange(8), sizes)
    name = np.arange(1, tokens + 1, dtype=np.float32).reshape(1, tokens, 1)
    part = PackedPart(name, np.repeat(name, 3, axis=2), segment, np.array(sizes) > 0)
    parts = hide(part, 0.75, max(sizes), jax.random.split(jax.random.key(0), 8))
    held = [np.asarray(p.patches)[np.asarray(p.segment) > 0, 0] for p in parts]
    assert sorted(np.concatenate(held)) == list(range(1, sum(sizes) + 1))
