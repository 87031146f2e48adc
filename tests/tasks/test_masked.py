"""What masked modelling hides and how it is scored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.losses.vocabulary import chunked_cross_entropy
from mmfm_jax.model.multimodal import MultimodalModel
from mmfm_jax.model.readings import one_reading
from mmfm_jax.model.vision import patches
from mmfm_jax.tasks import masked
from mmfm_jax.tasks.base import Views
from mmfm_jax.tasks.masked import Masked, MaskedConfig, choose


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 0.9))
def test_chosen_positions_are_present_distinct_and_of_the_share_asked_for(seed, share):
    rng = np.random.default_rng(seed)
    present = rng.random((6, 20)) < rng.random((6, 1))
    chosen, valid = (
        np.asarray(x) for x in choose(jax.random.split(jax.random.key(seed), 6), jnp.asarray(present), share)
    )
    for row in range(6):
        held, picked = present[row].sum(), chosen[row][valid[row]]
        assert present[row][picked].all() and len(set(picked)) == len(picked)
        assert abs(len(picked) - share * held) <= 1 and (len(picked) >= 1 or held == 0)


def test_every_position_is_hidden_as_often_as_any_other():
    present = jnp.ones((4000, 8), bool).at[:, 6:].set(False)
    chosen, valid = choose(jax.random.split(jax.random.key(0), 4000), present, 0.5)
    counts = np.bincount(np.asarray(chosen)[np.asarray(valid)], minlength=8)
    assert counts[6:].sum() == 0
    np.testing.assert_allclose(counts[:6] / 4000, 0.5, atol=0.05)


@pytest.fixture(scope="module")
def setting(material):
    model_config, spec = material.experiment.model, material.spec
    model = MultimodalModel(model_config, spec, nnx.Rngs(params=0))
    task = Masked("masked", MaskedConfig(depth=1), model_config, spec, nnx.Rngs(params=1))
    return task, Views(model, prepare(material.batch, spec, None, None), train=True)


def part(task, views, name, seed=0):
    """The mean of a part of the loss."""
    return task.loss(views, keys_of(views, seed)).parts[name].value


def keys_of(views, seed=0):
    return jax.random.split(jax.random.key(seed), len(views.batch.study))


def hidden_patches(task, views, keys) -> np.ndarray:
    """Which patches of each image are hidden, bool [study, patch]."""
    image, shape = views.batch.images["ct"], dict(task.shapes)["ct"]
    cut = np.asarray(patches(image.voxels, shape))
    numbers = np.broadcast_to(np.arange(cut.shape[1], dtype=np.float32)[:, None], cut.shape)
    z, y, x = shape.grid
    grid = numbers.reshape(len(cut), z, y, x, *shape.patch, shape.channels)
    voxels = grid.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(image.voxels.shape)
    numbered = dataclasses.replace(views.batch, images={"ct": dataclasses.replace(image, voxels=jnp.asarray(voxels))})
    found = np.asarray(task._draw(numbered, keys).patches["ct"].patches)[..., 0].astype(int)
    return (found[:, :, None] == np.arange(cut.shape[1])).any(axis=1)


@pytest.mark.parametrize("normalise", [True, False])
def test_image_loss_of_a_blind_head_is_the_mean_square_of_the_hidden_patches(setting, normalise):
    task, views = setting
    blind = nnx.clone(task)
    blind.config = blind.config.model_copy(update={"normalise": normalise})
    blind.voxels["ct"].kernel[...] = jnp.zeros_like(blind.voxels["ct"].kernel[...])
    image, keys = views.batch.images["ct"], keys_of(views)
    cut = np.asarray(patches(image.voxels, dict(task.shapes)["ct"]), np.float64)
    if normalise:
        cut = (cut - cut.mean(-1, keepdims=True)) / np.sqrt(cut.var(-1, keepdims=True) + 1e-6)
    here = hidden_patches(task, views, keys) & np.asarray(image.present)[:, None]
    found = blind.loss(views, keys).parts["image/ct"]
    assert found.count == here.sum() > 0
    np.testing.assert_allclose(found.value, np.square(cut[here]).mean(), rtol=1e-5)
    if not normalise:
        shown = ~hidden_patches(task, views, keys) & np.asarray(image.present)[:, None]
        assert abs(np.square(cut[shown]).mean() / np.square(cut[here]).mean() - 1) > 1e-3  # the shown ones would differ


def test_what_is_hidden_reaches_no_latent_and_is_what_is_scored(setting, monkeypatch):
    task, views = setting
    batch, keys = views.batch, keys_of(views)
    masks, shape = task._draw(one_reading(batch, dict(task.lengths))[0], keys), dict(task.shapes)["ct"]
    latents, fuse = [], MultimodalModel.fuse
    monkeypatch.setattr(
        MultimodalModel, "fuse", lambda self, *a, **k: latents.append(fuse(self, *a, **k)) or latents[-1]
    )
    expected = task.loss(views, keys).parts

    image = batch.images["ct"]
    z, y, x = shape.grid
    hidden = hidden_patches(task, views, keys).reshape(-1, z, y, x)
    for axis, size in enumerate(shape.patch, 1):
        hidden = hidden.repeat(size, axis)
    noise = np.random.default_rng(0)
    voxels = np.where(hidden[..., None], noise.random(image.voxels.shape), image.voxels).astype(np.float32)
    tokens = np.array(batch.texts["report"].tokens)
    chosen, valid = (np.asarray(part) for part in masks.tokens["report"])
    for row, column in zip(*np.nonzero(valid)):
        tokens[row, chosen[row, column]] = 3 + (tokens[row, chosen[row, column]] + 17) % 200
    assert (tokens[:, 12:] > 0).any()
    tokens[:, 12:] = (tokens[:, 12:] + 5) % 200  # the text beside the first would tell what is hidden of it
    columns, table = np.array(masks.columns), batch.table
    number_present, category_present = (np.asarray(x) for x in (table.number_present, table.category_present))
    numbers, categories = columns[:, : task.numbers], columns[:, task.numbers :]
    others = (number_present & ~numbers).any(1) | (category_present & ~categories).any(1)
    changed = dataclasses.replace(
        batch,
        images={"ct": dataclasses.replace(image, voxels=jnp.asarray(voxels))},
        texts={"report": dataclasses.replace(batch.texts["report"], tokens=jnp.asarray(tokens))},
        table=dataclasses.replace(
            table,
            numbers=jnp.where(numbers, table.numbers + 3, table.numbers),
            categories=jnp.where(categories, 1 - table.categories, table.categories),
            # nor whether it was missing, of a study with something else in its table
            number_present=number_present ^ (numbers & np.asarray(others)[:, None]),
        ),
    )
    got = task.loss(Views(views.model, changed, train=True), keys).parts
    np.testing.assert_array_equal(latents[1], latents[0])
    assert set(got) == {"image/ct", "text/report", "table/numbers", "table/categories"}
    for name in got:
        assert abs(float(got[name].value - expected[name].value)) > 1e-4, name


def test_text_loss_of_a_blind_head_is_the_logarithm_of_the_vocabulary(setting, material):
    task, views = setting
    blind = nnx.clone(task)
    blind.tokens.kernel[...] = jnp.zeros_like(blind.tokens.kernel[...])
    loss = part(blind, views, "text/report")
    np.testing.assert_allclose(loss, np.log(material.spec.vocabulary_size), rtol=1e-5)


def test_token_cross_entropy_equals_that_of_torch(setting, material, monkeypatch):
    torch = pytest.importorskip("torch")
    task, views = setting
    answers = {}

    def chosen(keys, present, share):
        answers["chosen"] = choose(keys, present, share)
        return answers["chosen"]

    def entropy(x, kernel, bias, target):
        answers["logits"] = x @ kernel + bias
        return chunked_cross_entropy(x, kernel, bias, target)

    monkeypatch.setattr(masked, "choose", chosen)
    monkeypatch.setattr(masked, "chunked_cross_entropy", entropy)
    loss = part(task, views, "text/report", seed=5)
    positions, valid = (np.array(x) for x in answers["chosen"])
    target = np.take_along_axis(np.array(views.batch.texts["report"].tokens), positions, 1)
    target[~valid] = -100  # torch's way to leave out
    logits = torch.tensor(np.array(answers["logits"])).reshape(-1, material.spec.vocabulary_size)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(target).reshape(-1).long())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
