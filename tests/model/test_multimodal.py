"""Stacking, remat, dtype, hiding and absence in the model as a whole."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.config.model import ModelConfig, TransformerConfig
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.model.flash import ALL
from mmfm_jax.model.multimodal import Hidden, MultimodalModel, Tokens, drop_modalities
from mmfm_jax.model.transformer import Transformer


@pytest.fixture(scope="module")
def model(material):
    return MultimodalModel(material.experiment.model, material.spec, nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def prepared(material):
    return prepare(material.batch, material.spec, None, None)


def test_a_stack_is_its_layers_one_after_another():
    config = TransformerConfig(width=8, depth=3, heads=2)
    model = Transformer(config, nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    graph, layers = nnx.split(model.blocks)
    y = x
    for i in range(config.depth):
        y = nnx.merge(graph, jax.tree.map(operator.itemgetter(i), layers))(y, ALL, None, None, ALL)
    np.testing.assert_allclose(model(x), model.norm(y), atol=1e-6)
    kernels = np.asarray(model.blocks.mlp.up.kernel[...])
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3  # layers start apart


@pytest.mark.parametrize("changed", [{"remat": "dots"}, {"remat": "full"}, {"unroll": 2}, {"unroll": 3}])
def test_remat_and_unroll_change_neither_values_nor_gradients(changed):
    def gradient(**changed):
        config = TransformerConfig(width=8, depth=3, heads=2, **changed)
        graph, state = nnx.split(Transformer(config, nnx.Rngs(params=0)))
        x = jax.random.normal(jax.random.key(1), (2, 5, 8))
        return jax.value_and_grad(lambda s: jnp.square(nnx.merge(graph, s)(x)).mean())(state)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradient(), gradient(**changed))


def test_low_precision_activations_stay_near_full_ones_over_float32_parameters(material, prepared, model):
    raw = material.experiment.model.model_dump() | {"dtype": "bfloat16"}
    low = MultimodalModel(ModelConfig.model_validate(raw), material.spec, nnx.Rngs(params=0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(low))} == {jnp.dtype("float32")}
    full, half = (m.fuse(m.encode(prepared)) for m in (model, low))
    assert half.dtype == jnp.bfloat16
    assert np.linalg.norm(half.astype(jnp.float32) - full) < 0.05 * np.linalg.norm(full)


def test_a_denied_modality_is_as_if_absent(material, prepared, model):
    absent = np.zeros(material.experiment.train.batch_size, bool)
    text = prepared.texts["report"]
    without = type(prepared)(
        prepared.study,
        prepared.images,
        {"report": type(text)(text.tokens, absent, text.digest)},
        prepared.table,
        prepared.labels,
    )
    np.testing.assert_array_equal(
        model.fuse(model.encode(prepared), {"text": absent}), model.fuse(model.encode(without))
    )


def test_texts_side_by_side_are_each_encoded_as_if_alone_and_fused_as_a_set(material, prepared, model):
    """Batches hold two texts of 12 tokens; both are there of some studies and one of others."""
    text = prepared.texts["report"]
    tokens = np.asarray(text.tokens)
    several = (tokens[:, 12:] > 0).any(axis=1)
    assert several.any() and (~several & text.present).any()

    def encoded(tokens):
        texts = {"report": type(text)(jnp.asarray(tokens), text.present, text.digest)}
        return model.encode(dataclasses.replace(prepared, texts=texts))

    both, swapped = encoded(tokens), encoded(np.roll(tokens, 12, axis=1))
    first, second = (encoded(tokens[:, part])["text/report"].x for part in (slice(12), slice(12, 24)))
    x = both["text/report"].x
    np.testing.assert_allclose(x[:, :12], first, atol=1e-5)
    np.testing.assert_allclose(x[:, 12:][several], second[several], atol=1e-5)
    latents = model.fuse(both)
    np.testing.assert_allclose(latents, model.fuse(swapped), atol=1e-5)
    np.testing.assert_array_less(1e-4, np.abs(latents - model.fuse(encoded(tokens[:, :12])))[several].max(axis=(1, 2)))


def test_no_token_of_a_text_sees_the_padding_behind_it(prepared, model):
    text = prepared.texts["report"]
    tokens = jnp.asarray(text.tokens[:, :12])
    longer = jnp.pad(tokens, ((0, 0), (0, 8)))
    short, padded = model.text(tokens, tokens != 0, 12), model.text(longer, longer != 0, 20)
    held = np.asarray(tokens != 0)
    assert held.any(axis=1).any() and not held.all(axis=1).all()
    np.testing.assert_allclose(padded[:, :12][held], short[held], atol=1e-5)


def test_hidden_columns_and_tokens_are_not_seen(material, prepared, model):
    shape = prepared.table.number_present.shape[0], 3
    hidden = Hidden({}, {"report": prepared.texts["report"].tokens != 0}, jnp.ones(shape, bool))
    seen = model.encode(prepared, hidden)
    table, text = prepared.table, prepared.texts["report"]
    changed = type(prepared)(
        prepared.study,
        prepared.images,
        {"report": type(text)(jnp.where(text.tokens != 0, 7, 0), text.present, text.digest)},
        type(table)(table.numbers + 1, table.number_present, table.categories, table.category_present),
        prepared.labels,
    )
    for part in ("table", "text/report"):
        np.testing.assert_array_equal(model.encode(changed, hidden)[part].x, seen[part].x)
        assert np.abs(model.encode(changed)[part].x - model.encode(prepared)[part].x).max() > 1e-3


def test_dropping_modalities_always_leaves_one_that_is_present():
    rng = np.random.default_rng(0)
    present = rng.random((3, 4000)) < 0.5
    parts = dict(zip(("image/ct", "text/report", "table"), present))
    encoded = {part: Tokens(jnp.zeros((4000, 1, 1)), jnp.asarray(held)[:, None]) for part, held in parts.items()}
    kept = drop_modalities(encoded, 0.7, jax.random.split(jax.random.key(0), 4000))
    seen = np.stack([np.asarray(kept[name]) for name in ("image", "text", "table")]) & present
    assert (seen.any(axis=0) == present.any(axis=0)).all()
    alone = present.sum(axis=0) == 1
    assert (seen == present)[:, alone].all()
    full = present.all(axis=0)
    assert abs(seen[:, full].mean() - (0.3 + 0.7**3 / 3)) < 0.04  # dropped by chance 0.7, but the last one stays
