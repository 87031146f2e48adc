"""TPU chips as published and pods of them by name.

Sources: [doc] Google Cloud's page of each generation, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x};
[v4] Jouppi et al., arXiv:2304.01433; [xla] what libtpu 0.0.42 says of itself when it compiles (its HBM limit, and the
cycles it gives a large matrix product). Bandwidths are bytes a second, 10^9 to a GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmfm_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    name: str
    device_kind: str
    """As JAX names its devices."""
    peak_flops: float
    """Dense bf16 FLOP/s."""
    peak_int8: float
    """Dense int8 operations a second; for tpu7x those of fp8, which it has instead."""
    hbm_bytes: float
    """What a program may use of the memory, all devices of the chip together [xla]."""
    hbm_bandwidth: float
    link_bandwidth: float
    """Of one inter-chip link one way: the published two-way sum over twice the links."""
    links: int
    """Inter-chip links of a chip: two a dimension of the torus."""
    dcn_bandwidth: float
    """Between slices, a chip's share of its host's network one way; that all hosts reach it is an assumption."""
    clock: float
    """Hz of the compiler's cycles: those at which its matrix units reach the published peak."""
    cores: int = 1
    devices: int = 1
    """That JAX shows for one chip; memory and peaks are split evenly over them."""
    options: tuple[tuple[str, str], ...] = ()
    """Of the topology, so that it is what the machines really show."""

    @property
    def vector_operations(self) -> float:
        """A second, in float32: each core has 4 vector units of 8 x 128 lanes (jax-ml.github.io/scaling-book/tpus)."""
        return self.cores * 4 * 8 * 128 * self.clock


CHIPS = {
    # 2 cores x 4 units of 128 x 128 x 2 FLOPs at 1.05 GHz = 275 [v4]; 6 links of 50 GB/s [v4]; DCN as v5p, unpublished.
    # Cloud machines show both cores of a v4 chip as one device ("megacore"), a bare topology as two.
    "v4": Chip(
        "v4",
        "TPU v4",
        275e12,
        275e12,
        30.75 * GIB,
        1228e9,
        50e9,
        6,
        6.25e9,
        1.05e9,
        cores=2,
        options=(("chip_config_name", "megacore"),),
    ),
    # 4 units of 128 x 128; 400 GB/s two ways over 4 links; 6.4 Tbit/s a pod of 256 [doc].
    "v5e": Chip("v5e", "TPU v5 lite", 197e12, 393e12, 15.75 * GIB, 819e9, 50e9, 4, 3.125e9, 1.5e9),
    # 2 cores (one device) x 4 units of 128 x 128; 1200 GB/s over 6 links; 50 Gbit/s a chip [doc]. int8: twice bf16.
    "v5p": Chip("v5p", "TPU v5", 459e12, 918e12, 95.74 * GIB, 2765e9, 100e9, 6, 6.25e9, 1.75e9, cores=2),
    # 2 units of 256 x 256; 800 GB/s over 4 links; 100 Gbit/s a chip [doc].
    "v6e": Chip("v6e", "TPU v6 lite", 918e12, 1836e12, 31.25 * GIB, 1638e9, 100e9, 4, 12.5e9, 1.75e9),
    # 2 devices x 2 units of 256 x 256 at 2.2 GHz = 2307; 1200 GB/s over 6 links; 100 Gbit/s a chip [doc].
    "tpu7x": Chip(
        "tpu7x", "TPU7x", 2307e12, 4614e12, 2 * 94.75 * GIB, 7380e9, 100e9, 6, 12.5e9, 2.2e9, cores=2, devices=2
    ),
}
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SHAPES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT, "tpu7x": CUBES}


@dataclass(frozen=True)
class Pod:
    topology: str
    chip: Chip
    slices: int
    devices: list[Any]

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.devices


def pod(topology: str, slices: int = 1) -> Pod:
    """The devices of a pod such as `v5e:16x16`, to compile for; none need be there.

    Call `compile_without_devices` before JAX starts. Raises UserError for a name that is not in the table.
    """
    check_pod(topology, slices)
    from jax.experimental import topologies

    chip, options = CHIPS[topology.partition(":")[0]], {"num_slices": slices} if slices > 1 else {}
    described = topologies.get_topology_desc(topology, platform="tpu", **dict(chip.options), **options)
    return Pod(topology, chip, slices, list(described.devices))


def check_pod(topology: str, slices: int) -> None:
    """Raises UserError for a name that is not in the table; needs no JAX."""
    kind, _, shape = topology.partition(":")
    if shape not in SHAPES.get(kind, ()):
        known = "; ".join(f"{kind}:{{{', '.join(shapes)}}}" for kind, shapes in SHAPES.items())
        raise UserError(f"--topology {topology}: is not known; known are {known}")
    if slices < 1:
        raise UserError(f"--slices {slices}: a pod has at least one slice; give 1 or more")


def chip_of(device: Any) -> Chip | None:
    """The chip that a device of this machine is of, or a part of; None if it is no TPU of the table."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device.device_kind), None)
