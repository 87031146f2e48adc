"""A task that crashes, hangs or eats memory costs itself and nothing else, and says nothing to the terminal."""

import ctypes
import multiprocessing
import os
import socket
import sys
import time

import numpy as np
import pytest

from mmfm_jax.data.ingest import ray_pool
from mmfm_jax.data.ingest.pool import Limits, Pool
from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError

LIMITS = Limits(workers=2, memory_bytes=256 * 2**20, seconds=120)


def work(task):
    print("secret on stdout", flush=True)
    os.write(2, b"secret on stderr")
    match task:
        case int():
            return task * 2
        case "crash":
            ctypes.string_at(0)
        case "exit":
            os._exit(7)
        case "hang":
            time.sleep(3600)
        case "memory":
            return np.ones(2**30, np.uint8).sum()
        case "refuse":
            raise Refused("damaged", "as said")
        case "bug":
            raise KeyError("secret in an exception")
        case "user":
            raise UserError("pydicom is not installed")
    return None


def test_each_task_ends_and_the_others_do_not_notice(capfd):
    tasks = [1, "crash", 2, 3, "memory", 4, "refuse", 5, "bug", "exit", 6, 7, 8]
    with Pool(LIMITS) as pool:
        results = dict(pool.run(work, tasks))
        assert dict(pool.run(work, [20, 30])) == {0: 40, 1: 60}  # another round
    assert sorted(results) == list(range(len(tasks)))
    for index, task in enumerate(tasks):
        result = results[index]
        if isinstance(task, int):
            assert result == task * 2
        else:
            assert isinstance(result, Refused) and "secret" not in result.detail
    reasons = {task: results[i].reason for i, task in enumerate(tasks) if isinstance(results[i], Refused)}
    expected = {"crash": "crashed", "exit": "crashed", "refuse": "damaged", "bug": "crashed"}
    if sys.platform == "linux":
        expected["memory"] = "out_of_memory"
    assert reasons == reasons | expected
    said = capfd.readouterr()
    assert "secret" not in said.out + said.err


def test_a_task_that_never_ends_is_ended():
    with Pool(Limits(workers=1, memory_bytes=2**28, seconds=2)) as pool:
        ((_, result),) = pool.run(work, ["hang"])
        assert isinstance(result, Refused) and result.reason == "timeout"
        assert multiprocessing.active_children() == []


def test_a_missing_package_ends_the_run():
    with Pool(LIMITS) as pool, pytest.raises(UserError, match="not installed"):
        list(pool.run(work, ["user"]))


def test_workers_end_with_the_pool():
    with Pool(LIMITS) as pool:
        results = pool.run(work, [1, 2, "hang"])
        next(results)
        del results
        assert list(pool.run(work, [])) == []
        assert dict(pool.run(work, [4])) == {0: 8}
    assert multiprocessing.active_children() == []


def test_without_ray_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(ray_pool, "find_spec", lambda name: None)
    message = r"Ray is not installed; run `pip install 'mmfm_jax\[ray\]'`"
    with pytest.raises(UserError, match=message), ray_pool.RayPool(LIMITS):
        pass


def test_a_ray_cluster_that_does_not_answer_is_said_at_once():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(UserError, match=f"no Ray cluster answers at {address}"):
                ray_pool.check_reachable(address)
        listening.listen()
        ray_pool.check_reachable(f"ray://127.0.0.1:{port}")
    ray_pool.check_reachable("auto")
    with pytest.raises(UserError, match="not HOST:PORT"):
        ray_pool.check_reachable("head:port")
