"""launch/host.sh tells an engine whether there is work left. `mmfm` is played by a script."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

HOST = Path(__file__).parents[2] / "launch" / "host.sh"


@pytest.fixture
def host(tmp_path):
    """`host(SCRIPT, ...)`: starts launch/host.sh with an `mmfm` that runs the lines of SCRIPT."""
    script = tmp_path / "launch" / "host.sh"  # a copy, so that no .venv of the checkout comes first
    script.parent.mkdir()
    script.write_text(HOST.read_text())
    script.chmod(0o755)
    mmfm = tmp_path / "bin" / "mmfm"
    mmfm.parent.mkdir()

    def start(lines: str, *arguments: str) -> subprocess.Popen:
        mmfm.write_text(f"#!/usr/bin/env bash\n{lines}\n")
        mmfm.chmod(0o755)
        environment = os.environ | {"PATH": f"{mmfm.parent}:{os.environ['PATH']}"}
        return subprocess.Popen([script, *arguments], env=environment, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize(
    "ends, status",
    [
        ('echo finished > "$MMFM_OUTCOME"', 0),
        ('echo stopped > "$MMFM_OUTCOME"', 75),
        ("exit 2", 2),
        ("kill -TERM $$", 75),
        ("kill -KILL $$", 137),
    ],
)
def test_only_a_run_that_was_stopped_asks_to_be_started_again(host, ends, status):
    assert host(ends).wait(timeout=30) == status


def test_arguments_reach_mmfm_as_they_are(host):
    process = host('printf "%s|" "$@"', "a config.yaml", "--run", "a run")
    assert process.communicate(timeout=30)[0] == "train|a config.yaml|--run|a run|"


def test_sigterm_reaches_mmfm_and_its_answer_is_waited_for(host):
    process = host(
        'trap "sleep 0.5; echo stopped > $MMFM_OUTCOME; exit 0" TERM; echo ready; while :; do sleep 0.1; done'
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
