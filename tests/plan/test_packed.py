"""A packed configuration is planned with the shapes that it is trained with."""

import jax
import numpy as np
import pytest

from mmfm_jax.config.training import MeshConfig
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.errors import UserError
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan import lower, measure
from mmfm_jax.plan.plan import tokens_of

PACKED = {"inputs.images.ct.pack": {"studies": 4, "tokens": 20}, "data.augment": {"flip": 0.5}}
ONE_TASK = {"tasks": {"disease": {"kind": "classification", "label": "disease"}}}


@pytest.fixture(scope="module")
def planned(make_experiment, material):
    experiment = make_experiment(PACKED | ONE_TASK)
    store, tokenizer = material.samples.store, material.samples.tokenizer
    return experiment, make_spec(experiment.inputs, store.schema, store.stats, tokenizer)


def test_the_shapes_planned_are_those_that_the_pipeline_makes(planned, material):
    experiment, spec = planned
    samples = Samples(material.samples.store, experiment.inputs, spec, material.samples.tokenizer)
    batches = local_batches(training_rows(samples, "train", 0), 16, np.arange(16), 0, 2, 1, samples.packed)
    batch = next(batches)
    batches.close()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    assert (
        jax.tree.map(lambda x: (x.shape, x.dtype), lower.batch_shapes(spec, tuple(spec.labels), 16, {"ct": "uint8"}))
        == shapes
    )
    noise = measure.random_batch(spec, experiment.labels, 16, {"ct": "uint8"})
    assert jax.tree.map(lambda x: (x.shape, x.dtype), noise) == shapes
    assert np.unique(np.asarray(noise.packed["ct"].segment)).tolist() == [1, 2, 3, 4]
    assert tokens_of(spec) == 20 // 4 + 2 * 12 + 3


def test_a_packed_step_is_traced_for_a_mesh(planned):
    experiment, spec = planned
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    program = lower.make_program(experiment, spec, mesh)
    with jax.set_mesh(mesh):
        traced = program.step.trace(program.state, program.batch)
    assert "padding" in traced.out_info[1]
    with pytest.raises(UserError, match=r"16, packed 4 studies a row, does not split .* make it a multiple of 32"):
        lower.make_program(experiment, spec, make_mesh(MeshConfig(fsdp=8)))
