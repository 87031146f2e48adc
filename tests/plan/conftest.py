"""Meshes of devices that are not there."""

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mmfm_jax.plan.chips import Pod


@pytest.fixture(scope="session")
def mesh_over():
    """`mesh_over(pod, "x")`: all its devices along one axis."""

    def make(of: Pod, axis: str) -> Mesh:
        return Mesh(np.array(of.devices), (axis,), axis_types=(AxisType.Auto,))

    return make
