"""Several processes train as one does."""

import json
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
STEPS = "6"


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_two_processes_with_two_devices_each_see_the_batches_and_losses_of_one(mmfm, config, environment, tmp_path):
    options = ("--train.steps", STEPS, "--checkpoint.every", "3")
    done = mmfm("train", config, "--run", tmp_path / "one", *options)
    assert done.returncode == 0, done.stderr
    launched = subprocess.run(
        [
            ROOT / "launch/local.sh",
            "2",
            config,
            "--run",
            tmp_path / "two",
            *options,
            "--mesh.data",
            "4",
            "--mesh.fsdp",
            "1",
        ],
        env=environment | {"MMFM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert launched.returncode == 0, launched.stderr
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [line["batch_checksum"] for line in one] == [line["batch_checksum"] for line in two]
    assert len(one) == int(STEPS)
    for alone, together in zip(one, two):
        for name in ("loss", "gradient_norm", "masked/loss", "image_text/loss", "disease/loss"):
            np.testing.assert_allclose(together[name], alone[name], rtol=1e-3, err_msg=name)

    # The run comes back on another number of processes.
    done = mmfm("train", config, "--run", tmp_path / "two", *options, "--mesh.fsdp", "-1")
    assert done.returncode == 0 and "nothing is left" in done.stdout, done.stderr
