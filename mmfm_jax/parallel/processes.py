"""How one process of a run finds the others, before JAX touches a device."""

from __future__ import annotations

import os

import jax

from mmfm_jax.errors import UserError


def start_processes() -> None:
    """Joins the run's other processes, if there are any.

    Three variables name a group that any launcher can form (`launch/local.sh` does): JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Under Slurm, GKE and Cloud TPU, JAX finds the group by itself.
    MMFM_CPU_DEVICES=n splits the CPU into n virtual devices, to try a mesh without accelerators.
    """
    if devices := _whole("MMFM_CPU_DEVICES"):
        jax.config.update("jax_num_cpu_devices", devices)
        # Two steps in flight share one pool of threads, and their collectives wait for each other for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    cluster = (
        (_whole("SLURM_NTASKS") or 1) > 1
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or "JOBSET_NAME" in os.environ
    )
    if address or cluster:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no effect on other platforms
    if address:
        processes, process = _whole("JAX_NUM_PROCESSES"), _whole("JAX_PROCESS_ID")
        if processes is None or process is None:
            raise UserError("JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too")
        jax.distributed.initialize(address, processes, process)
    elif cluster:
        jax.distributed.initialize()


def _whole(variable: str) -> int | None:
    """The whole number in an environment variable, None if that is not set. Raises UserError if it is anything else."""
    text = os.environ.get(variable)
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise UserError(f"{variable}={text}: is not a whole number; set one or unset it")
