"""FLOPs counted from the program against a hand count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.config.training import MeshConfig
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.losses.pairs import contrast
from mmfm_jax.model.transformer import Transformer
from mmfm_jax.parallel.mesh import AXES, make_mesh
from mmfm_jax.train.flops import model_flops, step_flops
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import initial_state, learner_shapes


def shapes_of(experiment, spec):
    """The learner's graph, the experiment and the shapes of its state."""
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    return (
        learner_shapes(experiment, spec)[0],
        experiment,
        jax.eval_shape(lambda: initial_state(experiment, spec, optimizer)),
    )


def test_a_scanned_transformer_counts_every_layer():
    width, depth, tokens, batch = 8, 5, 7, 3
    model = Transformer(TransformerConfig(width=width, depth=depth, heads=2), nnx.Rngs(params=0))
    x = jax.ShapeDtypeStruct((batch, tokens, width), jnp.float32)
    projections = 4 * width * width + 2 * 4 * width * width
    by_hand = depth * batch * (2 * tokens * projections + 2 * 2 * tokens * tokens * width)
    assert model_flops(model, x) == by_hand


def test_convolutions_and_branches_count():
    image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def convolve(image):
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    by_hand = 2 * 8 * 8 * 5 * 3 * 3 * 3
    assert model_flops(convolve, image) == by_hand

    def branch(image):
        return jax.lax.cond(image.sum() > 0, lambda x: convolve(x).sum(), lambda x: x.sum(), image)

    assert model_flops(branch, image) == by_hand


def test_a_ring_of_devices_counts_every_pair_once():
    devices, studies, width = 4, 16, 5
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(1, devices, 1, 2), AXES)
    side, paired = jax.ShapeDtypeStruct((studies, width), jnp.float32), jax.ShapeDtypeStruct((studies,), jnp.bool_)

    def loss(a, b, paired):
        return contrast("sigmoid", a, b, paired, jnp.ones(()))[0]

    by_hand = 2 * studies * studies * width
    assert model_flops(loss, side, side, paired) == by_hand
    with jax.set_mesh(mesh):
        assert model_flops(loss, side, side, paired) == by_hand


def test_kernels_count_their_grid_and_shards_their_devices():
    from jax.experimental import pallas as pl

    def kernel(x, y, out):
        out[...] = jnp.dot(x[...], y[...])

    block = pl.BlockSpec((8, 16), lambda i: (i, 0))
    call = pl.pallas_call(
        kernel, jax.ShapeDtypeStruct((32, 16), jnp.float32), grid=(4,), out_specs=block,
        in_specs=[block, pl.BlockSpec((16, 16), lambda i: (0, 0))],
    )  # fmt: skip
    x, y = jnp.zeros((32, 16)), jnp.zeros((16, 16))
    assert model_flops(call, x, y) == 2 * 32 * 16 * 16

    mesh, spec = make_mesh(MeshConfig(fsdp=8)), jax.sharding.PartitionSpec
    split = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(spec("fsdp"), spec()), out_specs=spec("fsdp"))
    assert model_flops(split, x, y) == 2 * 32 * 16 * 16


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_model_flops_of_a_step_depend_on_no_platform(material, kind):
    graph, experiment, state = shapes_of(material.experiment, material.spec)
    alone = step_flops(graph, experiment, material.spec, state, material.batch)
    device = jax.sharding.AbstractDevice(kind, 1, kind)
    axes = ("data", "fsdp", "sequence", "tensor")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 2, 2, 1), axes, abstract_device=device)):
        assert step_flops(graph, experiment, material.spec, state, material.batch) == alone > 0


def test_model_flops_of_a_step_depend_on_no_mesh(material):
    graph, experiment, state = shapes_of(material.experiment, material.spec)
    alone = step_flops(graph, experiment, material.spec, state, material.batch)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        assert step_flops(graph, experiment, material.spec, state, material.batch) == alone


STUDIES, PATCHES, VOXELS, REGISTERS = 16, 8, 32, 2  # of the small experiment: 4 x 8 x 8 in patches of 2 x 4 x 4
VISION, FUSION, CLASSES = 24, 16, 2  # widths


def by_hand(frozen: str | None, forward: float) -> float:
    """Backward has two products for each of forward, of the input and of the kernel, but for what is asked of none."""
    embedding, tokens = 2 * STUDIES * PATCHES * VOXELS * VISION, PATCHES + REGISTERS
    if frozen is None:
        return 3 * forward - embedding  # what enters is data
    if frozen == "model.vision.*":
        blocks = 2 * STUDIES * (2 * tokens * 12 * VISION**2 + 2 * 2 * tokens**2 * VISION)
        into_fusion = 2 * STUDIES * tokens * VISION * FUSION  # its kernel has a gradient, its input none
        return 3 * forward - 2 * (embedding + blocks) - into_fusion
    return forward + 2 * (
        2 * STUDIES * FUSION * CLASSES
    )  # of the head's kernel, and of its input for the norm before it


@pytest.mark.parametrize("frozen", [None, "model.vision.*", "model.*"])
def test_frozen_parameters_spare_their_products(make_experiment, material, frozen):
    """Whatever backward keeps, and in bfloat16 with sums in float32 as in float32."""
    found, kept = set(), {f"model.{stack}.remat": "full" for stack in ("vision", "text", "fusion")}
    tasks = {"tasks": {"disease": {"kind": "classification", "label": "disease"}}}
    for changes in ({}, kept, {"model.dtype": "bfloat16"}):
        groups = [{"match": frozen, "frozen": True}] if frozen else []
        experiment = make_experiment({**tasks, **changes, "optimizer.groups": groups})
        graph, _, state = shapes_of(experiment, material.spec)

        def loss(params, graph=graph):
            batch = prepare(material.batch, material.spec, None, None)
            return nnx.merge(graph, params).loss(batch, jax.random.key(0), train=True)[0]

        found.add(step_flops(graph, experiment, material.spec, state, material.batch))
    assert found == {by_hand(frozen, model_flops(loss, state.params))}
