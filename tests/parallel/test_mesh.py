"""The mesh never changes the mathematics: the same batches, losses and parameters on any shape of it."""

from typing import Any

import jax
import numpy as np
import pytest

from mmfm_jax.config.training import MeshConfig
from mmfm_jax.errors import UserError
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import AXES, make_mesh, slice_of
from mmfm_jax.plan import hlo
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import TrainState, initial_state, learner_shapes, state_shardings
from mmfm_jax.train.step import make_step

STEPS = 3
BY_HAND = pytest.mark.skipif(jax.device_count() < 16, reason="minutes more, and 16 devices: `make axes`")


def mesh_of(**sizes):
    """A mesh over as many of the devices as it needs."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES)


def run(mesh, experiment, spec, batch, start: TrainState | None = None):
    """Metrics of a few steps on one batch, the state they end in, its shardings, the states before and after the first.

    It begins with `start`, which is otherwise made on the mesh, as a run makes it.
    """
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    graph, *_ = learner_shapes(experiment, spec)
    shapes = jax.eval_shape(lambda: initial_state(experiment, spec, optimizer))
    shardings = state_shardings(shapes, mesh)
    rows = sharding.local_rows(experiment.train.batch_size, mesh)
    with jax.set_mesh(mesh):
        if start is None:
            start = jax.jit(lambda: initial_state(experiment, spec, optimizer), out_shardings=shardings)()
        state = jax.device_put(start, shardings)
        whole = sharding.global_batch(batch, rows, experiment.train.batch_size, mesh)
        step = jax.jit(
            make_step(graph, experiment, spec, optimizer),
            in_shardings=(shardings, sharding.by_study(mesh)),
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        step = step.lower(state, whole).compile()
        program = step.as_text() or ""
        assert "ENTRY" in program and not collectives_in_loops(program)
        history, states = [], []
        for _ in range(STEPS):
            state, metrics = step(state, whole)
            history.append({name: float(value) for name, value in metrics.items()})
            states.append(state)
    return history, state, shardings, start, states[0]


def collectives_in_loops(text: str) -> list[str]:
    """Of a compiled program. CPU devices may wait for each other for ever in these (mmfm_jax/parallel/loops.py)."""
    module = hlo.parse(text)
    everything = [i for computation in module.computations.values() for i in computation.instructions]
    loops = [i for i in everything if i.opcode == "while"]
    return [i.name for loop in loops for i in module.inside(loop) if i.opcode.startswith(hlo.COLLECTIVES)]


def gradients(first: TrainState) -> Any:
    """Of the first step, clipped: AdamW's first moment started at zero and holds nothing but a share of them."""
    moments: Any = first.optimizer
    return moments[1].mu


@pytest.fixture(scope="module")
def experiment(make_experiment):
    """All tasks, with all that is drawn in training."""
    noise = {"dropout": 0.1, "drop_path": 0.3, "layer_scale": 0.5}
    stacks = {f"model.{stack}.{name}": value for stack in ("vision", "text", "fusion") for name, value in noise.items()}
    decoder = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.1}
    return make_experiment({**stacks, "tasks.caption": {"kind": "caption", "field": "report", "decoder": decoder}})


@pytest.fixture(scope="module")
def alone(experiment, material):
    return run(mesh_of(), experiment, material.spec, material.batch)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 4},
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        pytest.param({"data": 2}, marks=BY_HAND),
        pytest.param({"fsdp": 8}, marks=BY_HAND),
        pytest.param({"sequence": 2}, marks=BY_HAND),
        pytest.param({"tensor": 2}, marks=BY_HAND),
        pytest.param({"data": 2, "fsdp": 2, "sequence": 2, "tensor": 2}, marks=BY_HAND),
    ],
    ids=str,
)
def test_losses_gradients_and_parameters_are_those_of_one_device(sizes, experiment, material, alone):
    mesh, begun = mesh_of(**sizes), alone[3]
    history, state, shardings, _, first = run(mesh, experiment, material.spec, material.batch, begun)
    for mine, single in zip(history, alone[0]):
        assert mine["batch_checksum"] == single["batch_checksum"]
        for name in single:
            np.testing.assert_allclose(mine[name], single[name], rtol=2e-4, atol=2e-5, err_msg=name)
    single = dict(jax.tree_util.tree_leaves_with_path(gradients(alone[4])))
    largest = max(float(np.abs(gradient).max()) for gradient in single.values())
    for path, mine in jax.tree_util.tree_leaves_with_path(gradients(first)):
        np.testing.assert_allclose(mine, single[path], rtol=1e-3, atol=1e-5 * largest, err_msg=str(path))
    # AdamW divides by the size of the gradient, so where that is rounding error the update is too.
    for mine, single in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[1].params)):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(single), atol=3e-3)
    split = [s for s in jax.tree.leaves(shardings.params) if not s.is_fully_replicated]
    assert len(split) > 20 or "fsdp" not in sizes
    moments: Any = shardings.optimizer[1]
    assert moments.mu == shardings.params and moments.nu == shardings.params


MUON = {
    "tasks": {"disease": {"kind": "classification", "label": "disease"}},
    "optimizer.kind": "muon",
    "optimizer.state_dtype": "bfloat16",
    "optimizer.groups": [{"match": "model.vision.*", "frozen": True}, {"match": "model.text.*", "layer_decay": 0.5}],
}


def test_muon_on_a_mesh_is_muon_on_one_device_and_its_state_is_split_as_the_parameters_are(make_experiment, material):
    experiment = make_experiment(MUON)
    history, state, shardings, begun, _ = run(mesh_of(fsdp=4, tensor=2), experiment, material.spec, material.batch)
    single, expected, _, start, _ = run(mesh_of(), experiment, material.spec, material.batch)
    assert begun is not None and start is not None
    for mine, alone in zip(jax.tree.leaves(begun.params), jax.tree.leaves(start.params)):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(alone), rtol=1e-6, atol=1e-7)
    for mine, alone in zip(history, single):
        np.testing.assert_allclose(mine["loss"], alone["loss"], rtol=2e-4)
    for mine, alone in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params)):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(alone), atol=3e-3)
    of_parameter = dict(jax.tree_util.tree_leaves_with_path(shardings.params))
    moments = 0
    for path, split in jax.tree_util.tree_leaves_with_path(shardings.optimizer):
        own = next((of_parameter[path[i:]] for i in range(len(path)) if path[i:] in of_parameter), None)
        moments += own is not None
        assert split == own if own is not None else split.is_fully_replicated
    assert moments > 60
    whole = [leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.sharding.is_fully_replicated]
    assert max(whole) <= 2 * 24  # the scales of norms


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


def test_of_several_slices_only_data_crosses_the_network(make_pod):
    devices = make_pod("v5e:4x4", 2).devices
    for sizes in ({"data": 2, "fsdp": 16}, {"data": 4, "fsdp": 2, "sequence": 2, "tensor": 2}):
        mesh = make_mesh(MeshConfig(**sizes), devices)
        assert mesh.size == 32
        groups = mesh.devices.reshape(sizes["data"], -1)  # fsdp, sequence and tensor of one index of data
        assert all(len({slice_of(device) for device in group}) == 1 for group in groups)
        assert {slice_of(device) for device in mesh.devices.flat} == {0, 1}


def test_data_that_does_not_split_over_slices_is_refused(make_pod):
    with pytest.raises(UserError, match=r"mesh\.data: 1 is not a multiple of the 2 slices"):
        make_mesh(MeshConfig(), make_pod("v5e:4x4", 2).devices)
