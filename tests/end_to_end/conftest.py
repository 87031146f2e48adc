"""Starts `mmfm` as a user does, in processes of its own with the cache of compiled programs of all tests."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfm_jax.experiment import Experiment, to_yaml

ROOT = Path(__file__).parents[2]
STACK = {"width": 8, "depth": 1, "heads": 2}
TINY = {
    "model": {"vision": STACK, "text": STACK, "table": {**STACK, "frequencies": 2},
              "fusion": {**STACK, "latents": 2, "drop": 0.2}, "dtype": "float32"},
}  # fmt: skip
"""What is asked of whole runs does not depend on the size of the model, and each process traces it anew."""


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
def make_tiny(make_experiment):
    """`make_tiny({"train.steps": 3, ...})`: the small experiment with a tiny model and fields changed."""

    def make(changes: dict) -> Experiment:
        return make_experiment(copy.deepcopy(TINY) | changes)

    return make


@pytest.fixture(scope="session")
def config(make_experiment, tmp_path_factory) -> Path:
    """The small experiment as a file."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(to_yaml(make_experiment()))
    return path


@pytest.fixture(scope="session")
def lines():
    """`lines(run)`: the whole lines of its metrics so far."""

    def read(run: Path) -> list[dict]:
        path = run / "metrics.jsonl"
        held = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in held if line.endswith("\n")]

    return read
