"""The task that regresses simple numbers of images."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmfm_jax.data.batch import PackedShape
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.errors import UserError
from mmfm_jax.losses.image_numbers import NAMES, image_numbers
from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.held_out import HeldOut, Split
from mmfm_jax.model.multimodal import MultimodalModel
from mmfm_jax.tasks.base import Views
from mmfm_jax.tasks.image_numbers import ImageNumbers, ImageNumbersConfig


@pytest.fixture(scope="module")
def setting(material):
    config, spec = material.experiment.model, material.spec
    task = ImageNumbers("numbers", ImageNumbersConfig(), config, spec, nnx.Rngs(1))
    model = MultimodalModel(config, spec, nnx.Rngs(0))
    return task, Views(model, prepare(material.batch, spec, None, None))


def test_the_loss_is_of_the_images_that_are_there_and_small_where_the_head_is_right(setting):
    task, views = setting
    image = views.batch.images["ct"]
    target = np.asarray(image_numbers(image.voxels, image.spacing_mm))
    present = np.asarray(image.present)
    assert 0 < present.sum() < len(present)
    blind = nnx.clone(task)
    kernel, bias = blind.head["ct"].kernel, blind.head["ct"].bias
    kernel[...] = jnp.zeros_like(kernel[...])
    mean = target[present].mean(axis=0)
    bias[...] = jnp.asarray(mean.ravel())
    off = np.abs(target[present] - mean)
    found = blind.loss(views, None).parts["image/ct"]
    huber = np.where(off < 1, off**2 / 2, off - 0.5).mean(axis=(1, 2))
    assert found.count == present.sum()
    np.testing.assert_allclose(found.total, huber.sum(), rtol=1e-4)


def test_numbers_are_learnt_from_the_tokens(setting):
    """Some steps on one batch halve the loss, which a head that sees no tokens cannot."""
    task, views = setting
    learner = nnx.List([nnx.clone(task), nnx.clone(views.model)])
    graph, state = nnx.split(learner)
    optimizer = optax.adam(1e-2)

    def loss(state):
        task, model = nnx.merge(graph, state)
        return task.loss(Views(model, views.batch), None).parts["image/ct"].value

    @jax.jit
    def step(state, moments):
        value, gradient = jax.value_and_grad(loss)(state)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(state, updates), moments, value

    moments, values = optimizer.init(state), []
    for _ in range(40):
        state, moments, value = step(state, moments)
        values.append(float(value))
    image = views.batch.images["ct"]
    target = np.asarray(image_numbers(image.voxels, image.spacing_mm))[np.asarray(image.present)]
    blind = float(optax.huber_loss(np.median(target, axis=0)[None] + 0 * target, target).mean())
    assert values[-1] < blind / 2


def test_explained_variance_is_1_of_what_is_right_and_0_of_the_mean(setting):
    task, views = setting
    found = {name: np.asarray(of) for name, of in task.predict(views).items()}
    target, present = found["ct_target"], found["ct_present"]
    n = len(target)

    def nothing(*_):
        raise AssertionError("not to be asked")

    def measured(said):
        split = Split(np.arange(n), np.arange(n), {}, {}, {}, {})
        seen = HeldOut(
            split, found | {"ct": said}, {}, nothing, "numbers", {}, Bootstrap(10, 0), 0, "test", (1,), 2, nothing,
            nothing, nothing, "", nothing, list, nothing,
        )  # fmt: skip
        return {name: m.value for name, m in task.measure(seen).measures.items()}

    names = {"numbers/ct/r2", *(f"numbers/ct/{name}/r2" for name in NAMES)}
    right, mean = measured(target), measured(0 * target + target[present].mean(axis=0))
    assert right.keys() == names and all(value == pytest.approx(1) for value in right.values() if np.isfinite(value))
    assert all(value == pytest.approx(0, abs=1e-3) for value in mean.values() if np.isfinite(value))
    assert np.isfinite(list(right.values())).sum() > 10


def test_images_that_are_all_packed_are_refused(material):
    spec = material.spec
    packed = spec.images["ct"].model_copy(update={"pack": PackedShape(studies=2, tokens=8)})
    spec = spec.model_copy(update={"images": {"ct": packed}})
    with pytest.raises(UserError, match=r"tasks\.numbers: measures images that are not packed"):
        ImageNumbers("numbers", ImageNumbersConfig(), material.experiment.model, spec, nnx.Rngs(0))
