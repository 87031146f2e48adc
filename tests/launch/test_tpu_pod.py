"""launch/tpu_pod.sh against a `gcloud` that acts out the life of a slice and records what it was asked."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu_pod.sh"

# What `describe` says next is the next line of `states`, where the last line stays; each `ssh` that trains plays the
# next line of `endings`.
GCLOUD = f"""#!{sys.executable}
import pathlib, sys, time
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
with (here / "calls").open("a") as calls:
    calls.write(repr(" ".join(words)) + "\\n")

def next_of(name):
    lines = (here / name).read_text().splitlines()
    if len(lines) > 1:
        (here / name).write_text("\\n".join(lines[1:]) + "\\n")
    return lines[0]

if "describe" in words:
    state = next_of("states")
    if state == "ABSENT":
        sys.exit(1)
    print(state)
elif "ssh" in words and "launch/host.sh" in words[-1]:
    ending = next_of("endings")
    if ending == "waits":
        (here / "training").touch()
        while not (here / "told").exists():
            time.sleep(0.02)
        ending = "75 75"
    for status in ending.split():
        print("launch/host.sh: status", status)
elif "ssh" in words and "pkill" in words[-1]:
    (here / "told").touch()
"""


@pytest.fixture
def pod(tmp_path):
    """`pod(states, endings)`: starts the script; `calls()` are gcloud's."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)

    def start(states: list[str], endings: list[str], **more: str) -> subprocess.Popen:
        (tmp_path / "states").write_text("\n".join(states) + "\n")
        (tmp_path / "endings").write_text("\n".join(endings) + "\n")
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL_S": "0", "ZONE": "here-1"} | more
        command = [SCRIPT, "slice", "configs/pod.yaml", "--run", "/runs/a b"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def verbs(tmp_path) -> list[str]:
    """What gcloud was asked to do, without the questions."""
    told = []
    for call in (tmp_path / "calls").read_text().splitlines():
        words = ast.literal_eval(call).split()
        kind = next(word for word in ("create", "delete", "describe", "scp", "ssh") if word in words)
        if kind == "ssh":
            kind = "train" if "launch/host.sh" in call else "stop" if "pkill" in call else "install"
        told.append(kind)
    return [kind for kind in told if kind != "describe"]


ONCE = ["scp", "install", "train"]


def test_a_run_is_asked_for_trained_on_all_workers_and_the_slice_deleted(pod, tmp_path):
    process = pod(["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], ["0 0"])
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the run has finished" in out
    assert verbs(tmp_path) == ["create", *ONCE, "delete"]
    calls = (tmp_path / "calls").read_text()
    assert "queued-resources create slice --zone=here-1 --node-id=slice --accelerator-type=v5litepod-16" in calls
    assert "--worker=all --command=cd mmfm && launch/host.sh configs/pod.yaml --run /runs/a\\\\ b;" in calls


@pytest.mark.parametrize("gone", ["SUSPENDED", "FAILED", "PREEMPTED"])
def test_a_preempted_slice_is_made_again_and_the_run_goes_on(pod, tmp_path, gone):
    # One host is gone and says nothing, the other's process ends in an error; the slice still looks alive for a moment.
    process = pod(["ABSENT", "ACTIVE", "ACTIVE", gone, gone, "ABSENT", "ACTIVE"], ["134", "0 0"])
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert verbs(tmp_path) == ["create", *ONCE, "delete", "create", *ONCE, "delete"]


def test_a_run_that_was_stopped_by_its_host_goes_on(pod, tmp_path):
    process = pod(["ACTIVE"], ["75 75", "0 0"])
    assert process.wait(timeout=60) == 0
    assert verbs(tmp_path) == [*ONCE, *ONCE, "delete"]


@pytest.mark.parametrize("ending, status", [("2 2", 2), ("1 134", 1)])
def test_a_run_that_fails_on_a_slice_that_is_there_is_not_repeated(pod, tmp_path, ending, status):
    process = pod(["ACTIVE"], [ending])
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status, out
    assert verbs(tmp_path) == [*ONCE, "delete"]


def test_a_slice_can_be_kept(pod, tmp_path):
    assert pod(["ACTIVE"], ["0 0"], KEEP="yes").wait(timeout=60) == 0
    assert verbs(tmp_path) == ONCE


def test_sigterm_reaches_the_workers_and_the_script_waits_for_the_save(pod, tmp_path):
    process = pod(["ACTIVE"], ["waits"])
    while not (tmp_path / "training").exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert verbs(tmp_path) == [*ONCE, "stop", "delete"]
