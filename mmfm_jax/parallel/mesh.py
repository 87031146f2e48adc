"""The device mesh of a run."""

from __future__ import annotations

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mmfm_jax.config import MeshConfig
from mmfm_jax.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(config: MeshConfig) -> Mesh:
    """All devices of all processes in the configured shape; neighbours in `tensor` and `sequence` are the closest.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices()
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise UserError(
            f"mesh: {asked} does not fit {len(devices)} devices; the sizes must multiply to that, or one may be -1"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    return Mesh(
        mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )
