"""A run goes over from two processes to one and on to four, and none of it shows in its batches and losses."""

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from mmfm_jax.experiment import to_yaml

ROOT = Path(__file__).parents[2]
STEPS = 40
PHASES = (
    (2, {"MMFM_CPU_DEVICES": "2"}, {"data": 2, "fsdp": 2}),
    (1, {}, {"data": 1, "fsdp": -1}),
    (4, {"MMFM_CPU_DEVICES": "1"}, {"data": 1, "fsdp": 4}),
)  # processes, environment, mesh


@pytest.fixture(scope="module")
def config(make_tiny, tmp_path_factory) -> Path:
    tasks = {
        "image_text": {"kind": "contrastive", "between": ["image", "text"], "width": 8, "mask_duplicates": True},
        "masked": {"kind": "masked", "depth": 1},
    }
    changes = {
        "tasks": tasks,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
        "train": {"steps": STEPS, "batch_size": 16, "log_every": 1, "validate_every": 20, "validate_batches": 1},
        "checkpoint": {"every": 100},
    }
    path = tmp_path_factory.mktemp("config") / "processes.yaml"
    path.write_text(to_yaml(make_tiny(changes)))
    return path


@pytest.fixture(scope="module")
def curve(lines):
    return lambda run: [line for line in lines(run) if "loss" in line]


def test_a_run_on_two_one_and_four_processes_has_the_batches_and_losses_of_one(
    mmfm, config, environment, curve, tmp_path
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = mmfm("train", config, "--run", whole)
    assert done.returncode == 0, done.stderr

    taken = []
    for processes, more, mesh in PHASES:
        sizes = [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", str(size))]
        command = [str(ROOT / "launch/local.sh"), str(processes), str(config), "--run", str(run), *sizes]
        with subprocess.Popen(
            command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as launched:
            before = len(curve(run))
            if processes != 4:  # the last goes to the end
                while launched.poll() is None and len(curve(run)) < before + 2:
                    time.sleep(0.05)
                launched.send_signal(signal.SIGTERM)
            _, err = launched.communicate(timeout=600)
        assert launched.returncode == 0, err
        taken.append(len(curve(run)) - before)
    assert min(taken) >= 2 and sum(taken) == STEPS  # each number of processes took steps of its own

    together, alone = curve(run), curve(whole)
    assert [line["step"] for line in together] == list(range(1, STEPS + 1))
    assert [line["batch_checksum"] for line in together] == [line["batch_checksum"] for line in alone]
    for mine, single in zip(together, alone, strict=True):
        for name in ("loss", "gradient_norm", "masked/loss", "image_text/loss"):
            np.testing.assert_allclose(mine[name], single[name], rtol=2e-3, err_msg=f"{name} {mine['step']}")
