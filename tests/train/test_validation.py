"""What validation measures is the mean over what validation patients hold, however it falls into batches."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.config.training import MeshConfig
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.pipeline import evaluation_batches
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.tasks.base import Views
from mmfm_jax.train.learner import Learner
from mmfm_jax.train.validation import Validation

ONE_TASK = {
    "tasks": {"disease": {"kind": "classification", "label": "disease"}},
    "model.vision.depth": 1,
    "model.text.depth": 1,
    "train.batch_size": 16,
    "train.validate_batches": 4,
}


@pytest.mark.parametrize("studies", [80, 72])  # 20 and 18 for validation: the second batch is nearly all padding
def test_validation_is_the_mean_over_labelled_studies(make_experiment, make_small_store, material, studies):
    experiment = make_experiment(ONE_TASK | {"data.store": make_small_store(studies)})
    store = type(material.samples.store).open(experiment.data.store)
    spec = material.spec
    samples = Samples(store, experiment.inputs, spec, material.samples.tokenizer, experiment.labels)
    learner = Learner(experiment, spec, nnx.Rngs(params=0))
    task: Any = learner.tasks["disease"]
    head = task.head
    head.kernel[...] = 30 * head.kernel[...]  # studies differ in how wrong the head is
    graph, state, buffers = nnx.split(learner, nnx.Param, ...)
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = Validation(experiment, graph, samples, spec, mesh, sharding.local_rows(16, mesh))(state, buffers)

    count = len(store.rows("validation"))
    (batch,) = evaluation_batches(samples, "validation", count, np.arange(count))
    logits = task.logits(Views(learner.model, prepare(batch, spec, None, None)).latents)
    label = batch.labels["disease"]
    known = np.asarray(label.present)
    assert 16 < count < 32 and 0 < known.sum() < count
    logits, true = np.asarray(logits, np.float64)[known], np.asarray(label.value)[known]
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(true)), true]
    parts = [losses[: known[:16].sum()].mean(), losses[known[:16].sum() :].mean()]
    assert abs(np.mean(parts) / losses.mean() - 1) > 0.01  # a mean of means would be seen
    np.testing.assert_allclose(found["validation/loss"], losses.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["validation/disease/loss"], losses.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["validation/disease/accuracy"], (logits.argmax(1) == true).mean(), rtol=1e-6)
