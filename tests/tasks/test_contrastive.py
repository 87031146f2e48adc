"""The contrastive losses against those of torch, and the hash by which equal texts are found."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.data.batch import Batch, TablePart, TextPart
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.losses.pairs import contrast
from mmfm_jax.model.multimodal import MultimodalModel
from mmfm_jax.tasks.base import Views
from mmfm_jax.tasks.contrastive import Contrastive, ContrastiveConfig, in_contexts, text_hashes


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


def test_studies_of_one_report_are_no_negatives_whatever_sentences_are_shown(material):
    """Two studies share a report of which different sentences are shown."""
    batch = prepare(material.batch, material.spec, None, None)
    text = batch.texts["report"]
    first, second = np.flatnonzero(np.asarray(text.present & batch.images["ct"].present))[:2]
    digest = np.array(text.digest)
    digest[second] = digest[first]
    assert (np.asarray(text.tokens)[first, :12] != np.asarray(text.tokens)[second, :12]).any()
    batch = dataclasses.replace(batch, texts={"report": dataclasses.replace(text, digest=jnp.asarray(digest))})
    model = MultimodalModel(material.experiment.model, material.spec, nnx.Rngs(params=0))

    def loss(masked: bool, sides) -> float:
        config = ContrastiveConfig(width=8, mask_duplicates=masked)
        task = Contrastive("image_text", config, material.experiment.model, material.spec, nnx.Rngs(params=1))
        task.embed = lambda encoded, side: sides[side]
        return float(task.loss(Views(model, batch), jax.random.split(jax.random.key(0), 16)).parts["loss"].value)

    rng = np.random.default_rng(0)
    image, other = rng.normal(size=(2, 16, 8)).astype(np.float32)
    here = np.asarray(text.present & batch.images["ct"].present)
    nearer = other.copy()
    nearer[second] = image[first]
    sides = {"image": (jnp.asarray(image), here), "text": (jnp.asarray(other), here)}
    moved = sides | {"text": (jnp.asarray(nearer), here)}
    tokens, digest = np.asarray(text.tokens)[:, :12], digest[:, :2]  # of the first of two texts
    alike = (digest[:, None] == digest[None]).all(-1) | (tokens[:, None] == tokens[None]).all(-1)
    for masked in (True, False):
        expected = []
        for texts in (other, nearer):
            logits = 10 * image @ texts.T - 10
            sign = 2 * np.eye(16) - 1
            kept = here[:, None] & here[None] & (np.eye(16, dtype=bool) | ~(alike & masked))
            expected.append(np.logaddexp(0, -sign * logits)[kept].sum() / here.sum())
        np.testing.assert_allclose([loss(masked, sides), loss(masked, moved)], expected, rtol=1e-4)


def test_prompts_stand_in_the_texts_that_hold_one_of_them():
    prompts = ("Margin is sharp.", "Margin is sharp. Very.", "Margin is poor.")
    texts = [
        {"report": "Round. Margin is poor. Solid."},
        {"report": "Nothing of the kind."},
        {"other": "Margin is poor."},
        {"report": "Margin is sharp. Very. End."},
        {"report": "Margin is sharp."},
    ]
    first, second, third = in_contexts(prompts, "report", texts, 2)
    assert first == ["Round. Margin is sharp. Solid.", "Margin is sharp. End."]
    assert second == ["Round. Margin is sharp. Very. Solid.", "Margin is sharp. Very. End."]
    assert third == ["Round. Margin is poor. Solid.", "Margin is poor. End."]
    assert in_contexts(prompts, "report", texts, 9)[0][2:] == ["Margin is sharp."]
    for none in (in_contexts(prompts, "report", texts, 0), in_contexts(prompts, "report", texts[1:3], 9)):
        assert none == [[prompt] for prompt in prompts]


# ---------------------------------------------------------------- texts side by side


@pytest.fixture(scope="module")
def side_by_side(material):
    """Task, model and a prepared batch with two texts of 12 tokens a study and an excerpt that is neither."""
    spec = material.spec.model_copy(update={"excerpts": ("report",)})
    raw, rng = material.batch, np.random.default_rng(0)
    text = raw.texts["report"]
    assert spec.text_tokens == {"report": 24} and (text.tokens[:, 12:] > 0).any()
    drawn = dataclasses.replace(text, excerpt=rng.integers(3, 200, (16, 12)).astype(np.int32))
    batch = prepare(dataclasses.replace(raw, texts={"report": drawn}), spec, None, None)
    model = MultimodalModel(material.experiment.model, spec, nnx.Rngs(params=0))
    config = ContrastiveConfig(width=8, mask_duplicates=True)
    return Contrastive("image_text", config, material.experiment.model, spec, nnx.Rngs(params=1)), model, batch


def with_text(batch, **changed):
    text = dataclasses.replace(batch.texts["report"], **{name: jnp.asarray(value) for name, value in changed.items()})
    return dataclasses.replace(batch, texts={"report": text})


def other_tokens(tokens, place=slice(None)):
    """Other words where there are words."""
    tokens = np.array(tokens)
    tokens[:, place] = np.where(tokens[:, place] > 0, 3 + (tokens[:, place] + 50) % 150, 0)
    return tokens


def test_a_contrast_reads_the_excerpt_in_training_and_the_first_text_in_validation(side_by_side):
    task, model, batch = side_by_side
    text, keys = batch.texts["report"], jax.random.split(jax.random.key(0), 16)

    def loss(batch, train):
        return float(task.loss(Views(model, batch, keys, train=train), keys).parts["loss"].value)

    first, second, excerpt = (
        with_text(batch, tokens=other_tokens(text.tokens, slice(12))),
        with_text(batch, tokens=other_tokens(text.tokens, slice(12, 24))),
        with_text(batch, excerpt=other_tokens(text.excerpt)),
    )
    for train, moved in ((True, (False, False, True)), (False, (True, False, False))):
        expected = loss(batch, train)
        assert tuple(abs(loss(other, train) - expected) > 1e-5 for other in (first, second, excerpt)) == moved
    alone = dataclasses.replace(text, tokens=text.excerpt, digest=text.digest[:, :2], excerpt=None)
    plain = nnx.clone(task)
    plain.apart = False  # as a task of one text a study
    views = Views(model, dataclasses.replace(batch, texts={"report": alone}), keys, train=True)
    np.testing.assert_allclose(plain.loss(views, keys).parts["loss"].value, loss(batch, True), rtol=1e-5)


def test_the_text_of_a_study_is_the_mean_over_those_side_by_side(side_by_side):
    task, model, batch = side_by_side
    tokens = np.asarray(batch.texts["report"].tokens)

    def vectors(tokens):
        empty = np.concatenate([tokens, np.zeros_like(tokens)], axis=1)
        return np.asarray(task.predict(Views(model, with_text(batch, tokens=empty)))["text"])

    found = task.predict(Views(model, batch))
    first, second = (tokens[:, part] for part in (slice(12), slice(12, 24)))
    held = np.stack([(part > 0).any(axis=1) for part in (first, second)]) & np.asarray(batch.texts["report"].present)
    assert held.all(axis=0).any() and (held.sum(axis=0) == 1).any() and (held.sum(axis=0) == 0).any()
    expected = held[0][:, None] * vectors(first) + held[1][:, None] * vectors(second)
    np.testing.assert_allclose(found["text"], expected / np.maximum(held.sum(axis=0), 1)[:, None], atol=1e-5)
    np.testing.assert_array_equal(found["text_present"], held.any(axis=0))
