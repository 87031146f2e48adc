"""Captions: what a token is predicted from, how it is scored, and that greedy decoding gives learnt sentences back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.data.batch import PAD
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.losses.mean import mean_where
from mmfm_jax.losses.vocabulary import chunked_cross_entropy
from mmfm_jax.model.decoder import TextDecoder
from mmfm_jax.model.multimodal import MultimodalModel
from mmfm_jax.tasks.base import Views
from mmfm_jax.tasks.caption import Caption, CaptionConfig, shift

START, ENTRIES, LATENT_WIDTH = 2, 30, 6
SIZE = TransformerConfig(width=16, depth=2, heads=2)


def make_decoder(tied=False) -> TextDecoder:
    return TextDecoder(SIZE, ENTRIES, LATENT_WIDTH, tied, jnp.dtype("float32"), nnx.Rngs(params=0))


def sentences(studies=6, length=9):
    """A text of 1 to `length` tokens for each study, and latents that tell them apart."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, ENTRIES, (studies, length))
    tokens[:, 0] = START
    tokens[np.arange(length) >= rng.integers(1, length + 2, studies)[:, None]] = PAD
    return jnp.asarray(tokens), jnp.asarray(rng.normal(size=(studies, 3, LATENT_WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def setting(material):
    model_config, spec = material.experiment.model, material.spec
    model = MultimodalModel(model_config, spec, nnx.Rngs(params=0))
    config = CaptionConfig(field="report", decoder=SIZE)
    return (
        Caption("caption", config, model_config, spec, nnx.Rngs(params=1)),
        model,
        prepare(material.batch, spec, None, None),
    )


def views_of(model, batch):
    return Views(model, batch, keys(batch), train=True)


def keys(batch):
    return jax.random.split(jax.random.key(0), len(batch.study))


def with_tokens(batch, tokens):
    return dataclasses.replace(
        batch, texts={"report": dataclasses.replace(batch.texts["report"], tokens=jnp.asarray(tokens))}
    )


def test_no_token_is_predicted_from_itself_or_what_follows(setting):
    task, model, batch = setting
    tokens = np.array(batch.texts["report"].tokens)

    @nnx.jit
    def logits(task, model, tokens):
        views = views_of(model, with_tokens(batch, tokens))
        first = views.batch.texts["report"].tokens[:, : task.length]
        return task.decoder.logits(task.decoder(first, task.latents(views)))

    expected = logits(task, model, tokens)
    assert tokens.shape[1] == 2 * task.length
    for at in (1, 5, task.length - 1):
        changed = tokens.copy()
        changed[:, at:] = (tokens[:, at:] + 7) % 100
        got = np.asarray(logits(task, model, changed))
        np.testing.assert_array_equal(got[:, :at], expected[:, :at])
        assert np.abs(got[:, at:] - expected[:, at:]).max() > 1e-3


def test_latents_do_not_know_the_text_but_know_the_image(setting):
    task, model, batch = setting
    expected = task.latents(views_of(model, batch))
    other = with_tokens(batch, (batch.texts["report"].tokens + 3) % 50)
    np.testing.assert_array_equal(task.latents(views_of(model, other)), expected)
    image = batch.images["ct"]
    bright = dataclasses.replace(batch, images={"ct": dataclasses.replace(image, voxels=1 - image.voxels)})
    assert np.abs(task.latents(views_of(model, bright)) - expected).max() > 1e-3


def test_loss_accuracy_and_perplexity_are_those_of_a_plain_loop_over_texts(setting):
    task, model, batch = setting
    views = views_of(model, batch)
    found = task.loss(views, keys(batch))
    loss, accuracy = found.parts["loss"].value, found.metrics["accuracy"].value
    text = batch.texts["report"]
    first = np.asarray(text.tokens)[:, : task.length]  # of two texts side by side
    logits = np.asarray(task.decoder.logits(task.decoder(first, task.latents(views))), np.float64)
    entropies, hits = [], []
    for row in np.flatnonzero(text.present):
        words = [int(token) for token in first[row] if token != PAD]
        for at, word in enumerate([*words[1:], PAD][: task.length - 1]):
            entropies.append(np.logaddexp.reduce(logits[row, at]) - logits[row, at, word])
            hits.append(logits[row, at].argmax() == word)
    assert len(entropies) > 20
    np.testing.assert_allclose(loss, np.mean(entropies), rtol=1e-5)
    assert found.parts["loss"].count == len(entropies)
    np.testing.assert_allclose(accuracy, np.mean(hits), rtol=1e-6)
    np.testing.assert_allclose(task.derived({"loss": loss})["perplexity"], np.exp(np.mean(entropies)), rtol=1e-5)
    predicted = task.predict(views)
    np.testing.assert_allclose(np.sum(predicted["nats"]), np.sum(entropies), rtol=1e-5)
    assert (
        np.sum(predicted["tokens"]) == len(entropies)
        and not np.asarray(predicted["tokens"])[~np.asarray(text.present)].any()
    )


def test_studies_of_text_alone_are_a_language_model_on_the_latents_of_nothing(setting):
    task, model, batch = setting
    nothing = jnp.zeros(batch.study.shape, bool)
    images = {role: dataclasses.replace(part, present=nothing) for role, part in batch.images.items()}
    table = jax.tree.map(jnp.zeros_like, batch.table)
    alone = dataclasses.replace(batch, images=images, table=table)
    latents = np.asarray(task.latents(views_of(model, alone)))
    np.testing.assert_array_equal(latents, np.broadcast_to(latents[:1], latents.shape))
    loss, slope = nnx.value_and_grad(lambda task: task.loss(views_of(model, alone), keys(alone)).parts["loss"].value)(
        task
    )
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    assert float(optax.tree.norm(slope)) > 0


def test_logits_token_by_token_are_those_of_the_whole_text_at_once():
    decoder = make_decoder()
    tokens, latents = sentences()
    whole = decoder.logits(decoder(tokens, latents))
    for length in range(1, tokens.shape[1] + 1):
        step = decoder.logits(decoder(tokens[:, :length], latents)[:, -1])
        np.testing.assert_allclose(step, whole[:, length - 1], atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_decoding_gives_back_the_sentences_of_an_overfitted_decoder(tied):
    decoder = make_decoder(tied)
    tokens, latents = sentences()
    graph, state = nnx.split(decoder)
    optimizer = optax.adam(1e-2)

    def loss(state):
        decoder = nnx.merge(graph, state)
        following, asked = shift(tokens, jnp.ones(len(tokens), bool))
        return mean_where(chunked_cross_entropy(decoder(tokens, latents), *decoder.output, following)[0], asked)

    def step(carry, _):
        state, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(state), moments)
        return (optax.apply_updates(state, updates), moments), None

    (state, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=150))((state, optimizer.init(state)))
    learnt = nnx.merge(graph, state)
    written = learnt.generate(latents, tokens[:, 0], tokens.shape[1])
    np.testing.assert_array_equal(written, tokens)
    exchanged = learnt.generate(latents[::-1], tokens[:, 0], tokens.shape[1])  # it reads the latents, not the row
    np.testing.assert_array_equal(exchanged, tokens[::-1])
    assert (learnt.head is None) == tied
