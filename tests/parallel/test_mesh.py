"""The mesh never changes the mathematics: the same batches, losses and parameters on any shape of it."""

from typing import Any

import jax
import numpy as np
import pytest

from mmfm_jax.config import MeshConfig
from mmfm_jax.errors import UserError
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import AXES, make_mesh
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import initial_state, learner_shapes, state_shardings
from mmfm_jax.train.step import make_step

STEPS = 3


def mesh_of(**sizes):
    """A mesh over as many of the devices as it needs."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES)


def run(mesh, experiment, spec, batch):
    """Metrics of a few steps on one batch, and the parameters they end in."""
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    graph, _ = learner_shapes(experiment, spec)
    shapes = jax.eval_shape(lambda: initial_state(experiment, spec, optimizer))
    shardings = state_shardings(shapes, mesh)
    rows = sharding.local_rows(experiment.train.batch_size, mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(experiment, spec, optimizer), out_shardings=shardings)()
        whole = sharding.global_batch(batch, rows, experiment.train.batch_size, mesh)
        step = jax.jit(
            make_step(graph, experiment, spec, optimizer),
            in_shardings=(shardings, sharding.by_study(mesh)),
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        history = []
        for _ in range(STEPS):
            state, metrics = step(state, whole)
            history.append({name: float(value) for name, value in metrics.items()})
    return history, state, shardings


@pytest.fixture(scope="module")
def alone(material):
    return run(mesh_of(), material.experiment, material.spec, material.batch)


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"fsdp": 4, "tensor": 2},
        {"data": 2, "fsdp": 2, "sequence": 2},
    ],
    ids=str,
)
def test_losses_and_parameters_are_those_of_one_device(sizes, material, alone):
    history, state, shardings = run(mesh_of(**sizes), material.experiment, material.spec, material.batch)
    for mine, single in zip(history, alone[0]):
        assert mine["batch_checksum"] == single["batch_checksum"]
        for name in single:
            np.testing.assert_allclose(mine[name], single[name], rtol=2e-4, atol=2e-5, err_msg=name)
    # AdamW divides by the size of the gradient, so where that is rounding error the update is too.
    for mine, single in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[1].params)):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(single), atol=3e-3)
    split = [s for s in jax.tree.leaves(shardings.params) if not s.is_fully_replicated]
    assert len(split) > 20
    moments: Any = shardings.optimizer[1]
    assert moments.mu == shardings.params and moments.nu == shardings.params


def test_each_axis_of_a_parameter_is_split_by_its_rule_where_the_mesh_divides_it():
    mesh = mesh_of(fsdp=4, tensor=2)
    spec = jax.sharding.PartitionSpec
    assert sharding.partition(("width", "mlp"), (8, 6), mesh) == spec(("fsdp",), ("tensor",))
    assert sharding.partition(("width", "mlp"), (3, 8, 6), mesh) == spec(None, ("fsdp",), ("tensor",))
    assert sharding.partition(("width", "mlp"), (6, 5), mesh) == spec(None, None)
    assert sharding.partition((None, "width"), (9, 8), mesh) == spec(None, ("fsdp",))


def test_a_process_reads_the_rows_its_devices_hold_and_they_join_to_the_batch():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    rows = sharding.local_rows(8, mesh)
    np.testing.assert_array_equal(rows, np.arange(8))
    values = np.arange(16).reshape(8, 2)
    joined = sharding.global_batch({"x": values}, rows, 8, mesh)["x"]
    np.testing.assert_array_equal(joined, values)
    assert {shard.data.shape for shard in joined.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize(
    "config, said",
    [({"fsdp": 3}, "8 devices"), ({"tensor": 16, "fsdp": -1}, "8 devices"), ({"data": 2, "fsdp": 2}, "data 2")],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, said):
    with pytest.raises(UserError, match=said):
        make_mesh(MeshConfig(**config))


def test_a_free_axis_takes_all_devices_that_remain():
    assert dict(make_mesh(MeshConfig(tensor=2, fsdp=-1)).shape) == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}


def test_a_batch_that_does_not_split_is_refused():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    sharding.check_batch_size(16, 4, mesh)
    with pytest.raises(UserError, match="make it a multiple of 16"):
        sharding.check_batch_size(24, 4, mesh)
