"""The launch files that engines read: valid where the engine says what is, and all end in the same command."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = [LAUNCH / name for name in ("host.sh", "local.sh", "slurm.sbatch", "tpu_pod.sh")]


def test_the_jobset_holds_nothing_that_its_api_does_not_know():
    """Against the models that Kubeflow generates from the OpenAPI of JobSet v1alpha2 and Kubernetes: what they do not
    know does not come back."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    held = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (held["apiVersion"], held["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    read = JobsetV1alpha2JobSet.from_dict(held)
    assert read is not None and read.to_dict() == held


def test_a_jobset_with_a_wrong_key_or_type_is_seen():
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    held = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    pod = held["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["terminationGracePeriodSecond"] = 1
    read = JobsetV1alpha2JobSet.from_dict(held)
    assert read is not None and read.to_dict() != held
    del pod["terminationGracePeriodSecond"]
    held["spec"]["failurePolicy"]["maxRestarts"] = "many"
    with pytest.raises(ValueError, match="maxRestarts"):
        JobsetV1alpha2JobSet.from_dict(held)


def test_the_jobset_starts_again_when_a_run_is_stopped_and_not_when_its_input_is_wrong():
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    (job,) = spec["replicatedJobs"]
    job, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # so status 75 fails the job
    assert job["completions"] == job["parallelism"] == 16 // 4  # a slice of 4x4 chips, 4 a host
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    claims = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} <= claims


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Recovery(Strict):
    strategy: str | None = None
    max_restarts_on_errors: int = Field(ge=0)
    recover_on_exit_codes: list[int]


class Resources(Strict):
    accelerators: str
    use_spot: Literal[True]
    job_recovery: Recovery


class Bucket(Strict):
    name: str
    mode: Literal["MOUNT", "COPY", "MOUNT_CACHED"]


class SkyPilotTask(Strict):
    """The fields of SkyPilot's YAML that are used. Its own schema lies in a package of some thirty requirements."""

    name: str
    num_nodes: int
    resources: Resources
    workdir: str
    envs: dict[str, str]
    file_mounts: dict[str, Bucket]
    setup: str
    run: str


def test_the_managed_spot_job_recovers_from_status_75():
    task = SkyPilotTask.model_validate(yaml.safe_load((LAUNCH / "skypilot.yaml").read_text()))
    assert task.resources.job_recovery.recover_on_exit_codes == [75]
    assert any(task.envs["RUN"].startswith(f"{place}/") for place in task.file_mounts)  # outlives the cluster


def test_the_managed_spot_job_forms_a_group_of_its_nodes(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    (tmp_path / "launch").mkdir()
    host = tmp_path / "launch" / "host.sh"
    host.write_text('#!/bin/sh\necho "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $*"\n')
    host.chmod(0o755)
    environment = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    command = ["bash", "-c", task["run"]]
    environment |= task["envs"] | {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "10.0.0.1:8476 2 1 configs/pod.yaml --run /runs/pod\n", done.stderr


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_pod.sh", "gke_jobset.yaml", "skypilot.yaml"])
def test_every_engine_starts_the_same_script_on_its_hosts(name):
    assert "launch/host.sh" in re.sub(r"(?m)^\s*#.*", "", (LAUNCH / name).read_text())


@pytest.mark.parametrize("name", ["configs/pod.yaml"])
def test_the_files_name_experiments_that_exist(name):
    assert (LAUNCH.parent / name).exists()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_can_be_read_by_bash(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
