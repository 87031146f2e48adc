"""What is traced depends on the devices it is meant for, not on those of the machine that traces."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mmfm_jax.parallel.platform import platform


def test_without_a_mesh_it_is_this_machine():
    assert platform() == jax.default_backend()


@pytest.mark.parametrize("name, kind", [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100 80GB HBM3"), ("cpu", "cpu")])
def test_a_mesh_names_the_platform_inside_jit_scan_and_shard_map(name, kind):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=name)
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
    said = []

    def body(x):
        said.append(platform())
        return x

    def program(x):
        x = jax.checkpoint(body)(body(x))
        x, _ = jax.lax.scan(lambda x, _: (body(x), None), x, length=2)
        spec = jax.sharding.PartitionSpec("data")
        return jax.shard_map(body, in_specs=spec, out_specs=spec)(x).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        jax.jit(jax.grad(program)).trace(jax.ShapeDtypeStruct((2,), jnp.float32))
    assert len(said) >= 4 and set(said) == {name}
