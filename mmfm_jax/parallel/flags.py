"""Which platform this machine has, and XLA's flags for it: read by XLA once, so set before anything imports JAX."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

TPU_FLAGS = (
    # An all-gather becomes a start and a done, with room for computation between them.
    "--xla_enable_async_all_gather=true",
    # A collective is fused with computation that does not need it, and both go on at once ...
    "--xla_tpu_enable_async_collective_fusion=true",
    # ... the gathers of FSDP's parameters among them ...
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    # ... and over several computations where one is too short to hide it.
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    # The tensor core computes while it feeds a collective.
    "--xla_tpu_overlap_compute_collective_tc=true",
)
"""libtpu 0.0.42 compiles the same program without them for v5e; for v6e they make more collectives asynchronous."""
GPU_FLAGS = (
    # Orders the program so that collectives run beside the computation that does not need them: the gathers of FSDP's
    # next layer behind the present one, the scatters of gradients behind the rest of backward. Off by default.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
)
CPU_FLAGS = (
    # Where the CPU plays several devices they share threads, and a collective holds one until all have come to it: the
    # fewer a device runs side by side, the fewer it takes from the others.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)
HUGE_PAGES = "glibc.malloc.hugetlb=1"
TPU_DEVICES = ("accel[0-9]*", "vfio/[0-9]*")
GPU_DEVICES = ("nvidia[0-9]*", "nvidiactl", "dxg", "kfd")


def has_tpu(dev: Path = Path("/dev")) -> bool:
    return _any(dev, TPU_DEVICES) and importlib.util.find_spec("libtpu") is not None


def set_flags(environment: MutableMapping[str, str] = os.environ, dev: Path = Path("/dev")) -> None:
    """Adds the flags of this machine's platform to the environment; what the user set there stays as it is.

    Where libtpu is installed and there is neither TPU nor GPU, it also chooses the CPU: libtpu would look for its pod,
    print warnings, and make several processes wait for it.
    """
    if has_tpu(dev):
        _add(environment, "LIBTPU_INIT_ARGS", TPU_FLAGS)
    elif _any(dev, GPU_DEVICES):
        _add(environment, "XLA_FLAGS", GPU_FLAGS)
    elif importlib.util.find_spec("libtpu") is not None:
        environment.setdefault("JAX_PLATFORMS", "cpu")


def set_flags_of_several_cpu_devices(environment: MutableMapping[str, str] = os.environ) -> None:
    """For virtual devices and for processes on CPUs; of no effect on other platforms. To be called before JAX compiles
    anything."""
    _add(environment, "XLA_FLAGS", CPU_FLAGS)


def with_huge_pages(
    environment: Mapping[str, str] = os.environ, dev: Path = Path("/dev"), system: str = sys.platform
) -> dict[str, str] | None:
    """The environment in which the CPU's memory comes in huge pages; None where there is nothing to add.

    XLA gives the scratch memory of a step on a CPU back and asks for it anew, and the kernel clears it page by page: a
    quarter of a step of 4 GB in pages of 4 KiB. glibc reads this once, before anything of ours runs.
    """
    held = environment.get("GLIBC_TUNABLES", "")
    name = HUGE_PAGES.partition("=")[0]
    if system != "linux" or name in held or _any(dev, TPU_DEVICES) or _any(dev, GPU_DEVICES):
        return None
    return {**environment, "GLIBC_TUNABLES": ":".join([*filter(None, [held]), HUGE_PAGES])}


def _any(dev: Path, patterns: tuple[str, ...]) -> bool:
    return any(path for pattern in patterns for path in dev.glob(pattern))


def _add(environment: MutableMapping[str, str], variable: str, flags: tuple[str, ...]) -> None:
    held = environment.get(variable, "")
    names = {flag.partition("=")[0] for flag in held.split()}
    new = [flag for flag in flags if flag.partition("=")[0] not in names]
    if new:
        environment[variable] = " ".join([*held.split(), *new])
