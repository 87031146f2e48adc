"""XLA's flags: those of the platform, and never over the user's."""

import os
import subprocess
import sys

import pytest

from mmfm_jax.parallel import flags


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine("accel0", libtpu=True)`: the folder of a machine's devices."""

    def make(*devices: str, libtpu: bool):
        monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: name if libtpu else None)
        for device in devices:
            (tmp_path / device).parent.mkdir(exist_ok=True)
            (tmp_path / device).touch()
        return tmp_path

    return make


@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
def test_a_tpu_gets_its_flags_through_libtpu(machine, device):
    environment: dict[str, str] = {}
    flags.set_flags(environment, machine(device, libtpu=True))
    assert environment == {"LIBTPU_INIT_ARGS": " ".join(flags.TPU_FLAGS)}


def test_a_gpu_gets_its_flags_through_xla_even_where_libtpu_is_installed(machine):
    environment: dict[str, str] = {}
    flags.set_flags(environment, machine("nvidia0", "nvidiactl", libtpu=True))
    assert environment == {"XLA_FLAGS": " ".join(flags.GPU_FLAGS)}


def test_what_the_user_set_stays(machine):
    mine = "--xla_gpu_autotune_level=0 --xla_gpu_enable_latency_hiding_scheduler=false"
    environment = {"XLA_FLAGS": mine, "JAX_PLATFORMS": "cuda"}
    flags.set_flags(environment, machine("nvidia0", libtpu=False))
    assert environment == {"XLA_FLAGS": mine, "JAX_PLATFORMS": "cuda"}
    flags.set_flags(environment, machine("nvidia0", libtpu=True))
    assert environment["JAX_PLATFORMS"] == "cuda"


def test_libtpu_without_a_tpu_leaves_the_cpu(machine):
    environment: dict[str, str] = {}
    flags.set_flags(environment, machine(libtpu=True))
    assert environment == {"JAX_PLATFORMS": "cpu"}
    environment = {}
    flags.set_flags(environment, machine(libtpu=False))
    assert environment == {}


def test_xla_knows_the_flags_of_gpus():
    """A flag that XLA does not know ends the process; builds for the CPU know those of GPUs too."""
    code = "import jax; jax.numpy.zeros(1).block_until_ready()"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags.GPU_FLAGS)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


def test_libtpu_knows_the_flags_of_tpus():
    """Compiles for a slice that is not there; skipped where libtpu is not installed."""
    pytest.importorskip("libtpu")
    code = """
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
sharding = NamedSharding(Mesh(np.array(devices), ("fsdp",)), PartitionSpec("fsdp"))
shape = jax.ShapeDtypeStruct((256, 256), np.float32)
jax.jit(lambda x, w: (x @ w).sum(), in_shardings=(sharding, sharding)).trace(shape, shape).lower().compile()
"""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": " ".join(flags.TPU_FLAGS),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cpu_gets_huge_pages_beside_what_the_user_set(machine):
    dev = machine(libtpu=False)
    held = {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    both = {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}
    assert flags.with_huge_pages(held, dev, "linux") == both
    assert flags.with_huge_pages({}, dev, "linux") == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert flags.with_huge_pages(both, dev, "linux") is None
    assert flags.with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, dev, "linux") is None
    assert flags.with_huge_pages({}, dev, "darwin") is None


@pytest.mark.parametrize("device", ["accel0", "nvidia0"])
def test_an_accelerator_needs_no_huge_pages(machine, device):
    assert flags.with_huge_pages({}, machine(device, libtpu=True), "linux") is None
