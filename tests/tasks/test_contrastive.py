"""Contrastive losses against optax, numpy and torch's formulas."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.data.batch import Batch, TablePart, TextPart
from mmfm_jax.tasks.contrastive import same_text, sigmoid_loss, softmax_loss

SEEDS = st.integers(0, 2**32 - 1)


def draw(seed, n=7):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (n, n)).astype(np.float32)
    paired = rng.random(n) < 0.7
    compared = paired[:, None] & paired[None] & ((rng.random((n, n)) < 0.8) | np.eye(n, dtype=bool))
    return logits, compared


@settings(max_examples=20)
@given(seed=SEEDS)
def test_sigmoid_loss_is_binary_cross_entropy_of_the_compared_pairs(seed):
    logits, compared = draw(seed)
    pairs = optax.losses.sigmoid_binary_cross_entropy(logits, np.eye(len(logits)))
    expected = np.asarray(pairs)[compared].sum() / max(np.diag(compared).sum(), 1)
    np.testing.assert_allclose(sigmoid_loss(jnp.asarray(logits), jnp.asarray(compared)), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=20)
@given(seed=SEEDS)
def test_softmax_loss_is_cross_entropy_both_ways_among_the_compared(seed):
    logits, compared = draw(seed)

    def one_way(logits, compared):
        losses = []
        for i in np.flatnonzero(np.diag(compared)):
            among = logits[i, compared[i]].astype(np.float64)
            losses.append(np.log(np.exp(among - logits[i, i]).sum()))
        return np.mean(losses) if losses else 0.0

    expected = (one_way(logits, compared) + one_way(logits.T, compared.T)) / 2
    np.testing.assert_allclose(softmax_loss(jnp.asarray(logits), jnp.asarray(compared)), expected, rtol=1e-4, atol=1e-6)


def test_both_losses_equal_those_of_torch():
    torch = pytest.importorskip("torch")
    logits, _ = draw(3)
    everything = np.ones_like(logits, bool)
    given = torch.tensor(logits)
    sign = 2 * torch.eye(len(logits)) - 1
    siglip = -torch.nn.functional.logsigmoid(sign * given).sum(dim=-1).mean()
    labels = torch.arange(len(logits))
    entropy = torch.nn.functional.cross_entropy
    clip = (entropy(given, labels) + entropy(given.T, labels)) / 2
    np.testing.assert_allclose(sigmoid_loss(jnp.asarray(logits), jnp.asarray(everything)), siglip, rtol=1e-5)
    np.testing.assert_allclose(softmax_loss(jnp.asarray(logits), jnp.asarray(everything)), clip, rtol=1e-5)


@settings(max_examples=20)
@given(seed=SEEDS)
def test_same_text_finds_equal_token_rows_and_no_others(seed):
    rng = np.random.default_rng(seed)
    fields = {name: rng.integers(0, 3, (40, 3), np.int32) for name in ("report", "history")}
    n = len(fields["report"])
    none = np.zeros((n, 0))
    texts = {name: TextPart(jnp.asarray(tokens), jnp.ones(n, bool)) for name, tokens in fields.items()}
    table = TablePart(none, none.astype(bool), none.astype(int), none.astype(bool))
    batch = Batch(np.arange(n), {}, texts, table, {})
    rows = np.concatenate(list(fields.values()), axis=1)
    np.testing.assert_array_equal(same_text(batch), (rows[:, None] == rows[None]).all(-1))
