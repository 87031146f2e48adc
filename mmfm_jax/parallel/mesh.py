"""The device mesh of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mmfm_jax.config.training import MeshConfig
from mmfm_jax.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes (or `devices`) in the configured shape; neighbours in `tensor` and `sequence` are
    the closest, and of several TPU slices only `data` crosses from one to the next.

    Elsewhere devices come host by host and `data` is the outermost axis, so it is the first to cross hosts.
    Raises UserError when the sizes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise UserError(
            f"mesh: {asked} does not fit {len(devices)} devices; the sizes must multiply to that, or one may be -1"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_of(device: Any) -> int:
    """The TPU slice that a device is of: inside one links are fast, between two lies the network."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def _arranged(shape: list[int], devices: list[Any]):
    slices = len({slice_of(device) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *within = shape
    if data % slices:
        raise UserError(
            f"mesh.data: {data} is not a multiple of the {slices} slices, and only data may cross the network between "
            f"slices; make it {slices} or a multiple"
        )
    return mesh_utils.create_hybrid_device_mesh(
        [data // slices, *within], [slices, 1, 1, 1], devices, allow_split_physical_axes=True
    )
