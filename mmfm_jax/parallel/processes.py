"""How one process of a run finds the others, before JAX touches a device."""

from __future__ import annotations

import os

import jax
from orbax.checkpoint import multihost

from mmfm_jax.errors import UserError
from mmfm_jax.parallel.flags import has_tpu, set_flags_of_several_cpu_devices

THREADS = 2  # of XLA for each device that a CPU plays: one to wait in a collective, one to work
PATIENCE_S = 3600  # of a process for the others: the largest programs compile in minutes


def start_processes() -> None:
    """Joins the run's other processes, if there are any.

    Three variables name a group that any launcher can form (`launch/local.sh` does): JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Under Slurm, GKE and Cloud TPU, JAX finds the group by itself.
    MMFM_CPU_DEVICES=n splits the CPU into n virtual devices, to try a mesh without accelerators.
    """
    devices = _whole("MMFM_CPU_DEVICES")
    if devices:
        split_cpu(devices)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    in_slurm = (_whole("SLURM_NTASKS") or 1) > 1
    if not (address or in_slurm or _in_jobset() or _in_cloud_tpu()):
        return
    set_flags_of_several_cpu_devices()
    _make_room(devices or 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no effect on other platforms
    if address:
        processes, process = _whole("JAX_NUM_PROCESSES"), _whole("JAX_PROCESS_ID")
        if processes is None or process is None:
            raise UserError("JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too")
        jax.distributed.initialize(address, processes, process)
    else:
        jax.distributed.initialize(local_device_ids=_gpus_of_a_node() if in_slurm else None)


def split_cpu(devices: int) -> None:
    """Makes the CPU so many virtual devices; to be called before JAX touches one."""
    jax.config.update("jax_num_cpu_devices", devices)
    _make_room(devices)
    # Two steps in flight share one pool of threads, and their collectives wait for each other for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    set_flags_of_several_cpu_devices()


def _make_room(devices: int) -> None:
    """Threads for the CPU's devices, which share a pool: a collective holds one until all have come to it. By default
    there is one a device, and those that wait would leave none to work."""
    os.environ.setdefault("PJRT_NPROC", str(max(THREADS * devices, os.cpu_count() or 1)))


def meet(where: str) -> None:
    """Waits until every process of the run is here, without touching a device.

    To be called before a program with collectives runs for the first time: some processes compile it minutes later than
    others, and collectives do not wait as long.
    """
    multihost.get_barrier_sync_fn()(key=where, timeout_ms=1000 * PATIENCE_S)


def _in_jobset() -> bool:
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "JOBSET_NAME" in os.environ


def _in_cloud_tpu() -> bool:
    """Whether this is a Cloud TPU VM, which names the hosts of its slice in its metadata and not in the environment."""
    elsewhere = {"TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"}
    return has_tpu() and not elsewhere & os.environ.keys()


def _gpus_of_a_node() -> list[int] | None:
    """All GPUs of the node where Slurm starts one process a node; otherwise JAX gives each process one GPU."""
    gpus = _whole("SLURM_GPUS_ON_NODE")
    alone = os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ.get("SLURM_STEP_NUM_NODES")
    return list(range(gpus)) if gpus and alone else None


def _whole(variable: str) -> int | None:
    """The whole number in an environment variable, None if that is not set. Raises UserError if it is anything else."""
    text = os.environ.get(variable)
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise UserError(f"{variable}={text}: is not a whole number; set one or unset it")
