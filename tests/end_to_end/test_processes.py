"""Several processes train as one does."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mmfm_jax.experiment import to_yaml

ROOT = Path(__file__).parents[2]
STEPS = 6
OPTIONS = ("--train.steps", str(STEPS), "--checkpoint.every", "3")


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def config(make_experiment, tmp_path_factory) -> Path:
    """The small experiment with fewer tasks, since each process compiles it."""
    tasks = {
        "image_text": {"kind": "contrastive", "between": ["image", "text"], "width": 16, "mask_duplicates": True},
        "masked": {"kind": "masked", "depth": 1},
    }
    path = tmp_path_factory.mktemp("config") / "processes.yaml"
    path.write_text(to_yaml(make_experiment({"tasks": tasks})))
    return path


@pytest.fixture(scope="module")
def alone(mmfm, config, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    done = mmfm("train", config, "--run", run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return curve(run)


@pytest.mark.parametrize(
    "processes, devices, mesh", [(2, 2, {"data": 2, "fsdp": 2}), (4, 1, {"data": 1, "fsdp": 4})], ids=str
)
def test_processes_see_the_batches_and_losses_of_one(
    processes, devices, mesh, alone, mmfm, config, environment, tmp_path
):
    sizes = [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", str(size))]
    launched = subprocess.run(
        [ROOT / "launch/local.sh", str(processes), config, "--run", tmp_path / "run", *OPTIONS, *sizes],
        env=environment | {"MMFM_CPU_DEVICES": str(devices)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert launched.returncode == 0, launched.stderr
    together = curve(tmp_path / "run")
    assert [line["batch_checksum"] for line in together] == [line["batch_checksum"] for line in alone]
    assert len(together) == STEPS
    for mine, single in zip(together, alone):
        for name in ("loss", "gradient_norm", "masked/loss", "image_text/loss"):
            np.testing.assert_allclose(mine[name], single[name], rtol=1e-3, err_msg=name)

    # The run comes back on another number of processes.
    done = mmfm("train", config, "--run", tmp_path / "run", *OPTIONS, "--mesh.fsdp", "-1")
    assert done.returncode == 0 and "nothing is left" in done.stdout, done.stderr
