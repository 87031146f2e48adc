"""What must be in the environment before JAX starts, for a compiler of TPU programs on a machine without a TPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

from mmfm_jax.errors import UserError
from mmfm_jax.extras import pip_install
from mmfm_jax.parallel.flags import TPU_FLAGS


def compile_without_devices() -> None:
    """Lets libtpu compile and JAX touch the CPU alone, whatever the machine has.

    Raises UserError when libtpu is not installed.
    """
    if find_spec("libtpu") is None:
        raise UserError(f"plan: the TPU compiler, which needs no TPU, is not installed; {pip_install('tpu')}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask what machine this is
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any will do: the topology says what is compiled for
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is held, so two plans may run side by side
        "TPU_MIN_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": " ".join(TPU_FLAGS),  # those that a run on TPUs has
    }.items():
        os.environ.setdefault(name, value)
