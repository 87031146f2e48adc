"""What backward keeps and recomputes never changes the mathematics, and costs what it says."""

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.errors import UserError
from mmfm_jax.model.flash import Segments
from mmfm_jax.model.transformer import REMAT, Transformer

POLICIES = ["none", *REMAT]
DEPTH = 3


def program(width=32, noisy=False, **options):
    """A loss of a stack's parameters and its input, and the shapes of the parameters."""
    options |= {"dropout": 0.2, "drop_path": 0.2, "layer_scale": 0.5} if noisy else {}
    config = TransformerConfig(width=width, heads=2, **options)
    made = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=jax.random.key(0)), cross_attention=True))
    graph, params = nnx.split(made)

    def loss(params, x):
        present = jnp.ones(x.shape[:2], bool).at[:, -1].set(False)
        keys = jax.random.split(jax.random.key(0), len(x))
        out = nnx.merge(graph, params)(x, Segments.present(present), memory=x[:, ::2], keys=keys)
        return jnp.mean(jnp.square(out - jnp.sin(jnp.arange(width))).astype(jnp.float32))

    return loss, params


@pytest.fixture(scope="module")
def compiled():
    """The loss with its gradient of a stack of blocks, by policy."""
    x = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
    programs = {policy: program(depth=DEPTH, remat=policy, noisy=True) for policy in POLICIES}
    return {
        policy: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile()
        for policy, (loss, params) in programs.items()
    }


def test_every_policy_gives_the_loss_and_the_gradients_of_none(compiled):
    rng = np.random.default_rng(0)
    shapes, x = program(depth=DEPTH, noisy=True)[1], jnp.asarray(rng.normal(size=(2, 32, 32)), jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    loss, gradients = compiled["none"](params, x)
    assert all(float(jnp.abs(gradient).max()) > 1e-6 for gradient in jax.tree.leaves(gradients))
    for policy in REMAT:
        value, found = compiled[policy](params, x)
        np.testing.assert_allclose(value, loss, rtol=1e-6)
        for mine, expected in zip(jax.tree.leaves(found), jax.tree.leaves(gradients)):
            np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-6, err_msg=policy)


def test_a_policy_that_keeps_less_takes_less_memory(compiled):
    size = {policy: compiled[policy].memory_analysis().temp_size_in_bytes for policy in POLICIES}
    assert size["full"] < size["attention"] < size["hidden"] < size["dots"] < size["none"]


def test_the_attention_policy_keeps_the_output_of_each_attention_and_full_keeps_none():
    def kept(policy):
        loss, params = program(depth=DEPTH, remat=policy)
        traced = jax.make_jaxpr(jax.grad(loss))(params, jax.ShapeDtypeStruct((2, 16, 32), jnp.float32)).jaxpr
        forward = next(equation for equation in traced.eqns if equation.primitive.name == "scan")
        return [out.aval.shape for out in forward.outvars[1:]]

    entered, attended = (DEPTH, 2, 16, 32), (DEPTH, 2, 16, 2, 16)
    assert kept("full") == [entered]
    found = kept("attention")
    numbers = DEPTH * 2 * 16 * 2  # one a token and head
    statistics = [shape for shape in found if np.prod(shape) <= numbers]
    assert len(statistics) == 7  # of norms: three of the block, and two of queries and two of keys
    rest = sorted(shape for shape in found if shape not in statistics)
    assert rest == sorted([entered, attended, attended])  # of itself, and of the memory


@pytest.mark.parametrize("policy", POLICIES)
def test_a_deep_stack_is_no_longer_a_program_than_a_shallow_one(policy):
    def lines(depth):
        loss, params = program(depth=depth, remat=policy)
        x = jax.ShapeDtypeStruct((2, 8, 32), jnp.float32)
        return len(jax.jit(jax.grad(loss)).lower(params, x).as_text().splitlines())

    assert lines(48) <= 1.05 * lines(12)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which compiles for TPUs")
def test_offload_keeps_what_enters_each_block_in_host_memory_on_a_tpu(monkeypatch):
    from jax.experimental import topologies

    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened
    }.items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, 16, 1, 1), ("data", "fsdp", "sequence", "tensor"))
    whole, by_study = (NamedSharding(mesh, PartitionSpec(axis)) for axis in (None, "fsdp"))

    def host_bytes(policy):
        loss, params = program(width=128, depth=6, remat=policy)
        x = jax.ShapeDtypeStruct((16, 128, 128), jnp.bfloat16)
        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(loss), in_shardings=(whole, by_study))
            made = gradient.trace(params, x).lower(lowering_platforms=("tpu",)).compile()
        in_host_space = re.findall(r"bf16\[([\d,]+)\]\{[^}]*S\(5\)\}", made.as_text() or "")
        memory: Any = made.memory_analysis()
        return memory.host_temp_size_in_bytes, set(in_host_space)

    assert host_bytes("full") == (0, set())
    entered = 6 * 1 * 128 * 128  # blocks, studies a chip, tokens, width
    assert host_bytes("offload") == (2 * entered, {"6,1,128,128"})


def test_offload_is_refused_where_there_is_no_host_memory_to_use(monkeypatch):
    class Device:
        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(UserError, match="no pinned_host memory for remat offload; use remat full"):
        program(depth=2, remat="offload")
    program(depth=2, remat="full")
