"""Starts `mmfm` as a user does, in processes of its own with the cache of compiled programs of all tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfm_jax.experiment import to_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def mmfm(environment):
    """`mmfm("train", ...)`: the finished process."""

    def run(*arguments, **more) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mmfm_jax.cli", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, **more)

    return run


@pytest.fixture(scope="session")
def config(make_experiment, tmp_path_factory) -> Path:
    """The small experiment as a file."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(to_yaml(make_experiment()))
    return path
