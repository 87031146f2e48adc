"""FLOPs counted from the program against a hand count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.config.training import MeshConfig
from mmfm_jax.losses.pairs import contrast
from mmfm_jax.model.transformer import Transformer
from mmfm_jax.parallel.mesh import AXES, make_mesh
from mmfm_jax.train.flops import model_flops, step_flops
from mmfm_jax.train.state import learner_shapes


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
    graph, params = learner_shapes(material.experiment, material.spec)
    alone = step_flops(graph, material.spec, params, material.batch)
    device = jax.sharding.AbstractDevice(kind, 1, kind)
    axes = ("data", "fsdp", "sequence", "tensor")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 2, 2, 1), axes, abstract_device=device)):
        assert step_flops(graph, material.spec, params, material.batch) == alone > 0


def test_model_flops_of_a_step_depend_on_no_mesh(material):
    graph, params = learner_shapes(material.experiment, material.spec)
    alone = step_flops(graph, material.spec, params, material.batch)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        assert step_flops(graph, material.spec, params, material.batch) == alone
