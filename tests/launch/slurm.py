"""`make launch-slurm`: a real Slurm of two virtual nodes on this machine trains, is preempted, goes on and finishes.

    python tests/launch/slurm.py

Needs Debian's slurm-wlm and munge, and root, since slurmd starts the job as its owner. What it starts and writes lies
in one temporary folder, and is gone at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch")
SBIN = "/usr/sbin:/sbin"
STEPS = "150"
OPTIONS = ("--train.steps", STEPS, "--train.log-every", "1", "--checkpoint.every", "20")

CONF = """\
ClusterName=mmfm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=30
JobRequeue=1
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def main() -> int:
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]
    if missing or os.geteuid():
        why = f"there is no {missing[0]}" if missing else "this is not root"
        print(f"make launch-slurm: {why}; as root, install Debian's slurm-wlm and munge", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mmfm-slurm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        config = experiment(folder)
        alone = folder / "alone"
        environment = environment_of(folder)
        train = [sys.executable, "-m", "mmfm_jax.cli", "train", str(config), "--run", str(alone), *OPTIONS]
        subprocess.run(train, env=environment, check=True, stdout=subprocess.DEVNULL)
        told(f"one process trained {STEPS} steps")
        stack.enter_context(cluster(folder, environment))
        preempted_twice(folder, config, environment)
        compare(curve(alone), curve(folder / "run"))
    return 0


def preempted_twice(folder: Path, config: Path, environment: dict[str, str]) -> None:
    """Trains on two nodes; Slurm preempts the job, which goes on on two; a SIGTERM as before a time limit: on one."""
    run = folder / "run"

    def slurm(*command: str) -> str:
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    log = folder / "job.log"
    options = ("--parsable", "--nodes=2", f"--output={log}")
    job = slurm("sbatch", *options, "launch/slurm.sbatch", str(config), "--run", str(run), *OPTIONS).strip()

    def state() -> str:
        return slurm("squeue", "--noheader", "--job", job, "--states=all", "--format=%T").strip()

    def restarts() -> int:
        return int(re.findall(r"Restarts=(\d+)", slurm("scontrol", "show", "job", job))[0])

    def until(what: str, reached: Callable[[], bool], seconds: float = 420) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline or state() in ("FAILED", "NODE_FAIL", "CANCELLED", "BOOT_FAIL"):
                text = log.read_text() if log.exists() else ""
                raise SystemExit(f"{what}: not reached, the job is {state()}\n{text}")
            time.sleep(0.1)
        told(what)

    until("training on 2 nodes", lambda: last_step(run) >= 3)
    slurm("scontrol", "requeue", job)
    until("preempted by scontrol requeue, queued again", lambda: restarts() == 1 and state() in ("PENDING", "RUNNING"))
    before = last_step(run)
    until(f"went on after step {before} on 2 nodes", lambda: last_step(run) > before)
    slurm("scancel", "--batch", "--signal=TERM", job)
    until("stopped by SIGTERM to the batch script, queued again", lambda: restarts() == 2)
    before = last_step(run)
    assert before < int(STEPS), "the run finished before it could be stopped; raise STEPS"
    slurm("scontrol", "update", f"JobId={job}", "NumNodes=1-1", "NumTasks=1", "NumCPUs=1")
    until("finished", lambda: state() == "COMPLETED")
    assert last_step(run) == int(STEPS) and restarts() == 2
    starts = [line for line in lines(run) if "start" in line]
    told(f"starts began at steps {[line['step'] for line in starts]}")
    assert len(starts) == 3 and "NumNodes=1 " in slurm("scontrol", "show", "job", job)
    told("\n".join(text for text in log.read_text().splitlines() if text.startswith(("Stopped", "launch/", "Goodput"))))


def compare(alone: dict[int, dict], together: dict[int, dict]) -> None:
    """Refuses curves that differ: the batches must be the same, the losses within the rounding of other shards."""
    assert alone.keys() == together.keys() == set(range(1, int(STEPS) + 1))
    furthest = 0.0
    for step, line in alone.items():
        assert line["batch_checksum"] == together[step]["batch_checksum"], f"step {step} saw another batch"
        furthest = max(furthest, abs(together[step]["loss"] / line["loss"] - 1))
    assert furthest < 1e-2, f"losses differ by {furthest:.1e}"
    told(f"{len(alone)} steps: batches equal those of one process, losses within {furthest:.1e} of it")


@contextlib.contextmanager
def cluster(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Munge, one slurmctld and two slurmd, until the block ends."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(3):
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            ports.append(taken.getsockname()[1])
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=ports, host=host))
    (folder / "state").mkdir()
    hosts = Path("/etc/hosts")
    known = hosts.read_text()
    processes: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        output = (folder / f"{Path(command[0]).name}.out").open("a")
        processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))

    try:
        hosts.write_text(f"{known.rstrip()}\n127.0.0.1 n1 n2\n")
        subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], env=environment, check=True)
        munge = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        paths = [f"--{option}={folder / file}" for option, file in munge.items()]
        start("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *paths)
        start("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            (folder / f"spool.{node}").mkdir()
            start("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 60
        while True:
            found = subprocess.run(["sinfo", "-h", "-o", "%t %D"], env=environment, capture_output=True, text=True)
            if found.stdout.strip() == "idle 2":
                break
            if time.monotonic() > deadline:
                logs = "".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
                raise SystemExit(f"Slurm did not start: {found.stdout}{found.stderr}\n{logs}")
            time.sleep(0.2)
        told("Slurm runs, 2 nodes idle")
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
        hosts.write_text(known)


def environment_of(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MMFM_CPU_DEVICES": "2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "SLURM_CONF": str(folder / "slurm.conf"),
    }


def experiment(folder: Path) -> Path:
    """The small experiment of the tests and its store, as files."""
    import importlib.util

    found = importlib.util.spec_from_file_location("small", ROOT / "tests" / "conftest.py")
    assert found and found.loader
    small = importlib.util.module_from_spec(found)
    found.loader.exec_module(small)
    from mmfm_jax.data.store.writer import write_store
    from mmfm_jax.experiment import to_yaml, validate

    write_store(str(folder / "store"), small.SCHEMA, small.small_studies(120))
    raw = small.SMALL | {"data": small.SMALL["data"] | {"store": str(folder / "store")}}
    path = folder / "small.yaml"
    path.write_text(to_yaml(validate(raw, "the small experiment")))
    return path


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    held = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in held if line.endswith("\n")]


def curve(run: Path) -> dict[int, dict]:
    return {line["step"]: line for line in lines(run) if "loss" in line}


def last_step(run: Path) -> int:
    return max(curve(run), default=0)


def told(text: str) -> None:
    print(f"launch-slurm: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
