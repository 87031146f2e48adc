"""The kind of device that a program is being traced for, which need not be one of this machine."""

from __future__ import annotations

import jax


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the devices of the mesh in force (`jax.set_mesh`), else of this machine.

    `mmfm plan` compiles for a pod on a laptop, where `jax.default_backend()` would say `cpu`. What it answers is part
    of what is traced, so ask it inside the function that is compiled and nowhere else.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The devices' name, such as `TPU v4`; of those that `platform` speaks of."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


VMEM = {"TPU v4": 16 * 2**20, "TPU v5": 16 * 2**20}
"""Of a core, what a kernel may use, in bytes: 16 MiB of v4 (Jouppi et al., arXiv:2304.01433). For v5p libtpu 0.0.42
compiles a kernel of 16 MiB and not one of 26, for v5e, v6e and tpu7x one of 26 too."""


def vmem_bytes(kind: str) -> int:
    """What a kernel on devices of this name may use of a core's vector memory."""
    return VMEM.get(kind, 32 * 2**20)
