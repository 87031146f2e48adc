"""What masked modelling hides and how it is scored."""

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
    return task.loss(views, jax.random.split(jax.random.key(seed), len(views.batch.study))).parts[name].value


def test_image_loss_of_a_blind_head_is_the_mean_square_of_present_images(setting):
    """Whatever is masked: over many draws a head that answers 0 is wrong by the mean square of the voxels."""
    task, views = setting
    blind = nnx.clone(task)
    blind.voxels["ct"].kernel[...] = jnp.zeros_like(blind.voxels["ct"].kernel[...])
    loss = nnx.jit(lambda task, seed: part(task, views, "image/ct", seed))
    squares = [float(loss(blind, seed)) for seed in range(40)]
    image = views.batch.images["ct"]
    cut = np.asarray(patches(image.voxels, dict(task.shapes)["ct"]), np.float64)[np.asarray(image.present)]
    np.testing.assert_allclose(np.mean(squares), np.square(cut).mean(), rtol=0.05)


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
