# pyright: reportMissingImports=false
"""The pool on a Ray cluster: the same workers with the same limits, on all of its machines.

A Ray task holds a local worker of `pool.py` and hands it one file or series. So a file that crashes its reader costs
that file, as on one machine, while a machine that is lost costs nothing: Ray gives its tasks to others. Inputs and the
work folder must lie at the same path on every machine.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from mmfm_jax.data.ingest.pool import Limits, Pool
from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError
from mmfm_jax.extras import pip_install

_TRIES = 4
"""Machines that may be lost under one task before it is refused."""
_AHEAD = 2
"""Tasks that are handed to Ray for each core of the cluster, so that none waits for the next."""
_COUNT_CORES_S = 5.0
_ANSWER_S = 10.0


class RayPool:
    """What `Pool` is, over the cores that a running Ray cluster has at the time. A context manager.

    `limits.workers`: most tasks at once, or 0 for as many as there are cores. Raises UserError on entering when Ray is
    not installed or no cluster runs or answers; RAY_ADDRESS names one that does not run here.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._connected_here = False

    def __enter__(self) -> RayPool:
        if find_spec("ray") is None:
            raise UserError(f"Ray is not installed; {pip_install('ray')}")
        import ray

        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS") or "auto"
            check_reachable(address)
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, TimeoutError) as error:
                raise UserError(
                    "no Ray cluster was found; start one with `ray start --head`, or name it in RAY_ADDRESS"
                ) from error
            self._connected_here = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._connected_here:
            import ray

            ray.shutdown()

    def run(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """As `Pool.run`; a task whose machine is lost is done again on another, so what it does must bear that."""
        import ray
        from ray.exceptions import RayError

        one = replace(self.limits, workers=1)
        remote = ray.remote(num_cpus=1, max_retries=_TRIES - 1)(_work)
        left = enumerate(tasks)
        busy: dict[Any, int] = {}
        at_once, counted = 0, -_COUNT_CORES_S
        try:
            while True:
                if time.monotonic() - counted >= _COUNT_CORES_S:  # the cluster may grow and shrink
                    cores = max(1, int(ray.cluster_resources().get("CPU", 0)))
                    at_once, counted = self.limits.workers or cores * _AHEAD, time.monotonic()
                while len(busy) < at_once and (task := next(left, None)) is not None:
                    busy[remote.remote(one, function, task[1])] = task[0]
                if not busy:
                    return
                ready, _ = ray.wait(list(busy), timeout=_COUNT_CORES_S)
                for reference in ready:
                    index = busy.pop(reference)
                    try:
                        kind, value = ray.get(reference)
                    except RayError as error:
                        why = f"its machine was lost {_TRIES} times ({type(error).__name__})"
                        kind, value = "refused", ("crashed", why)
                    if kind == "user":
                        raise UserError(value)
                    yield index, Refused(*value) if kind == "refused" else value
        finally:
            for reference in busy:
                ray.cancel(reference, force=True)


def check_reachable(address: str) -> None:
    """Raises UserError when nothing answers at HOST:PORT or SCHEME://HOST:PORT, since Ray would ask for minutes.

    What names no place, such as `auto`, passes.
    """
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        host, port = place.hostname, place.port
    except ValueError as error:
        raise UserError(f"RAY_ADDRESS: {address} is not HOST:PORT; mend it or unset it ({error})") from error
    if host is None or port is None:
        return
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or name "
            "one that runs"
        ) from error


def _work(limits: Limits, function: Callable[[Any], Any], task: Any) -> tuple[str, Any]:
    """What a Ray task does; errors are values, since Ray writes exceptions to its logs."""
    try:
        ((_, result),) = _local(limits).run(function, [task])
    except UserError as error:
        return "user", str(error)
    return ("refused", result.args) if isinstance(result, Refused) else ("ok", result)


@functools.cache
def _local(limits: Limits) -> Pool:
    """The local worker of this Ray process, kept for the tasks to come."""
    pool = Pool(limits)
    atexit.register(pool.__exit__)
    return pool
