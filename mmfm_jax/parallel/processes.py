"""How one process of a run finds the others, before JAX touches a device."""

from __future__ import annotations

import os

import jax

CLUSTERS = ("SLURM_JOB_ID", "TPU_WORKER_HOSTNAMES", "JOBSET_NAME", "OMPI_MCA_orte_hnp_uri")


def start_processes() -> None:
    """Joins the run's other processes, if there are any.

    Three variables name a group that any launcher can form (`launch/local.sh` does): JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Under Slurm, GKE and Cloud TPU, JAX finds the group by itself.
    MMFM_CPU_DEVICES=n splits the CPU into n virtual devices, to try a mesh without accelerators.
    """
    if devices := os.environ.get("MMFM_CPU_DEVICES"):
        jax.config.update("jax_num_cpu_devices", int(devices))
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"]))
    elif (
        int(os.environ.get("SLURM_NTASKS", "1")) > 1
        or _several(os.environ.get("TPU_WORKER_HOSTNAMES", ""))
        or "JOBSET_NAME" in os.environ
    ):
        jax.distributed.initialize()


def _several(hosts: str) -> bool:
    return "," in hosts
