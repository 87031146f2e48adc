# pyright: reportMissingImports=false
"""Ingest on a real Ray cluster of three machines on this one, of which one is killed in the middle: `make ingest-ray`.

Not among the tests that always run: starting a cluster takes longer than all that it then does.
"""

import filecmp
import os
import threading
import time
from pathlib import Path

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])

import ray
from ray.cluster_utils import Cluster

from mmfm_jax.cli import main
from mmfm_jax.data.ingest.pool import Limits
from mmfm_jax.data.ingest.ray_pool import RayPool
from mmfm_jax.data.refuse import Refused
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.errors import UserError


@pytest.fixture
def cluster():
    """A cluster and its two machines that work; the third leads."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [made.add_node(num_cpus=1) for _ in range(2)]
    ray.init(made.address, log_to_driver=False)
    yield made, workers
    ray.shutdown()
    made.shutdown()


def same_bytes(a: Path, b: Path) -> bool:
    files = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (a, b)]
    return files[0] == files[1] and filecmp.cmpfiles(a, b, files[0], shallow=False)[1:] == ([], [])


def crashes_and_the_like() -> None:
    """What crashes a reader, never ends or eats memory costs itself, as in the local pool."""
    tasks = ["1 + 1", "__import__('os')._exit(7)", "__import__('time').sleep(99)", "bytes(2**31)"]
    with RayPool(Limits(0, 2**28, 5)) as pool:
        results = dict(pool.run(eval, tasks))
        with pytest.raises(UserError, match="as said"):
            list(pool.run(exec, ["from mmfm_jax.errors import UserError\nraise UserError('as said')"]))
    assert results.pop(0) == 2 and all(isinstance(one, Refused) for one in results.values())
    assert [results[i].reason for i in (1, 2, 3)] == ["crashed", "timeout", "out_of_memory"]


def a_lost_task_is_done_again(made: Cluster, workers: list) -> None:
    """Each machine sleeps through a task at any time, so the one that is killed takes one with it."""
    threading.Timer(3, lambda: made.remove_node(workers.pop(), allow_graceful=False)).start()
    with RayPool(Limits(0, 2**28, 60)) as pool:
        assert dict(pool.run(time.sleep, [1.0] * 14)) == dict.fromkeys(range(14))
    assert len(workers) == 1
    workers.append(made.add_node(num_cpus=1))


def test_a_killed_machine_costs_nothing_and_the_store_is_that_of_one_machine(cluster, hospital, tmp_path):
    crashes_and_the_like()
    made, workers = cluster
    a_lost_task_is_done_again(made, workers)
    for i in range(6, 60):
        hospital.admit(f"MRN{1000 + i // 2}", f"ACC{i}", seed=i)
    (hospital.exports / "dicom/torn.dcm").write_bytes(b"\0" * 128 + b"DICM torn")
    local = hospital.ingest(tmp_path / "local")
    killed = threading.Event()

    def kill_one() -> None:
        while len(list((tmp_path / ".ray.ingest").glob("*.npy"))) < 5:
            time.sleep(0.005)
        made.remove_node(workers.pop(), allow_graceful=False)
        killed.set()

    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        main(["ingest", str(hospital.described), "--out", str(tmp_path / "ray"), "--runner", "ray"])
    assert ended.value.code == 3 and killed.is_set()
    assert len(StudyStore.open(str(tmp_path / "ray"))) == 60
    assert same_bytes(tmp_path / "local", tmp_path / "ray") and len(local.rejects) == 1
