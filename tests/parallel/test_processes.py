"""What a process does before JAX touches a device."""

import sys
from pathlib import Path

import jax
import pytest

from mmfm_jax.parallel.processes import THREADS


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted under /proc")
def test_virtual_devices_have_threads_to_wait_in():
    """A collective holds one until all devices have come to it; those that wait must leave some to work."""
    jax.device_count()
    names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert names.count("tf_XLAEigen") >= THREADS * jax.device_count()
