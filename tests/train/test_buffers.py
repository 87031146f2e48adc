"""What a task keeps from step to step beside parameters, by a task that counts its parts and keeps a running mean."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.config.training import CheckpointConfig
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.tasks import task_types
from mmfm_jax.tasks.base import Task
from mmfm_jax.tasks.classification import Classification, ClassificationConfig
from mmfm_jax.train import learner
from mmfm_jax.train.checkpoint import Checkpoints
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import initial_state, learner_shapes, state_shardings
from mmfm_jax.train.step import make_step


class KeepingConfig(ClassificationConfig):
    kind: Literal["keeping"] = "keeping"  # pyright: ignore[reportIncompatibleVariableOverride]


class Keeping(Classification):
    Config = KeepingConfig

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.parts = nnx.Variable(jnp.zeros((), jnp.int32))
        self.mean = nnx.Variable(jnp.zeros(8), axes=("width",))

    def loss(self, views, keys):
        if views.train:
            self.parts.set_value(self.parts.get_value() + 1)
            self.mean.set_value(0.9 * self.mean.get_value() + 0.1 * views.batch.study.astype(jnp.float32).mean())
        return super().loss(views, keys)


del Task.kinds["keeping"]  # is a task of these tests alone


@pytest.fixture(params=[1, 2])
def kept(request, make_experiment, material, monkeypatch):
    monkeypatch.setattr(learner, "task_types", lambda: task_types() | {"classification": Keeping})
    experiment = make_experiment(
        {
            "tasks": {"disease": {"kind": "classification", "label": "disease"}},
            "train.accumulate": request.param,
            "train.ema_decay": 0.9,
            "model.vision.depth": 1,
            "model.text.depth": 1,
        }
    )
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    graph, *_ = learner_shapes(experiment, material.spec)
    make = functools.partial(initial_state, experiment, material.spec, optimizer)
    return experiment, make, jax.jit(make_step(graph, experiment, material.spec, optimizer))


def test_buffers_go_from_part_to_part_and_step_to_step_and_nothing_else_touches_them(kept, material, tmp_path):
    experiment, make, step = kept
    start = state = jax.jit(make)()
    parts = experiment.train.accumulate
    for tree in (state.params, state.optimizer, state.average):
        named = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        assert not any("'parts'" in path or "'mean'" in path for path in named)
    mean = np.zeros(8)
    for number in range(1, 3):
        state, _ = step(state, material.batch)
        for part in range(parts):
            mean = 0.9 * mean + 0.1 * np.asarray(material.batch.study)[part::parts].mean()
        found = state.buffers["tasks"]["disease"]
        assert int(found["parts"].get_value()) == number * parts
        np.testing.assert_allclose(found["mean"].get_value(), mean, rtol=1e-5)

    poisoned = dataclasses.replace(state, params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    skipped, _ = step(poisoned, material.batch)
    assert int(skipped.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, skipped.buffers, state.buffers)

    checkpoints = Checkpoints(tmp_path, CheckpointConfig(best=None))
    checkpoints.save(2, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(2, jax.eval_shape(make), None)
    checkpoints.close()
    assert restored.buffers["tasks"]["disease"]["parts"].get_value().dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert not np.array_equal(start.buffers["tasks"]["disease"]["mean"].get_value(), mean)


def test_a_buffer_is_split_by_the_axes_it_names_and_else_whole(kept):
    experiment, make, _ = kept
    places: Any = state_shardings(jax.eval_shape(make), make_mesh(experiment.mesh)).buffers
    found = places["tasks"]["disease"]
    assert jax.tree.leaves(found["mean"])[0].spec == jax.sharding.PartitionSpec(("fsdp",))
    assert jax.tree.leaves(found["parts"])[0].is_fully_replicated
