"""The contrastive losses against those of torch, and the hash by which equal texts are found."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.data.batch import Batch, TablePart, TextPart
from mmfm_jax.losses.pairs import contrast
from mmfm_jax.tasks.contrastive import text_hashes


def test_both_losses_equal_those_of_torch():
    torch = pytest.importorskip("torch")
    n, scale, bias = 7, 8.0, -2.0
    a, b = np.random.default_rng(3).normal(size=(2, n, 4)).astype(np.float32)
    sides = jnp.asarray(a), jnp.asarray(b), jnp.ones(n, bool), jnp.float32(scale)
    logits = scale * torch.tensor(a) @ torch.tensor(b).T
    sign = 2 * torch.eye(n) - 1
    siglip = -torch.nn.functional.logsigmoid(sign * (logits + bias)).sum(dim=-1).mean()
    labels = torch.arange(n)
    entropy = torch.nn.functional.cross_entropy
    clip = (entropy(logits, labels) + entropy(logits.T, labels)) / 2
    np.testing.assert_allclose(contrast("sigmoid", *sides, jnp.float32(bias))[0].value, siglip, rtol=1e-5)
    np.testing.assert_allclose(contrast("softmax", *sides)[0].value, clip, rtol=1e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_two_texts_have_equal_hashes_exactly_if_they_are_equal_whole_or_in_what_is_shown(seed):
    rng = np.random.default_rng(seed)
    fields = {name: rng.integers(0, 3, (40, 3), np.int32) for name in ("report", "history")}
    digests = {name: rng.integers(0, 3, (40, 2), np.uint32) for name in fields}
    n = len(fields["report"])
    none = np.zeros((n, 0))
    texts = {
        name: TextPart(jnp.asarray(tokens), jnp.ones(n, bool), jnp.asarray(digests[name]))
        for name, tokens in fields.items()
    }
    table = TablePart(none, none.astype(bool), none.astype(int), none.astype(bool))
    batch = Batch(np.arange(n), {}, texts, table, {})
    hashes = np.asarray(text_hashes(batch))
    for way, of in enumerate((digests, fields)):
        rows, found = np.concatenate(list(of.values()), axis=1), hashes[:, way]
        np.testing.assert_array_equal((found[:, None] == found[None]).all(-1), (rows[:, None] == rows[None]).all(-1))
