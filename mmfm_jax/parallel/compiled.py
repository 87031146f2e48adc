"""Where compiled programs are kept, so that a run that starts again does not compile again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep_compiled() -> str | None:
    """Turns JAX's persistent compilation cache on and returns its place, or None where there is none to be had.

    JAX_COMPILATION_CACHE_DIR decides where it is set, empty to have no cache; otherwise it is a folder of the user's
    cache directory. Call it once the devices are known.
    """
    if VARIABLE in os.environ:
        return os.environ[VARIABLE] or None
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfm_jax" / "compiled"
    if jax.default_backend() == "cpu":
        place /= processor()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to is no reason not to train
        return None
    jax.config.update("jax_compilation_cache_dir", str(place))
    return str(place)


def processor() -> str:
    """A name for this kind of processor: a program compiled for another may hold instructions that this one lacks, and
    the folder may be shared between machines."""
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"cpu-{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
