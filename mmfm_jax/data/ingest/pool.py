"""Workers that read untrusted files: processes with limits of memory and time, replaced when they die.

`concurrent.futures` gives up its whole pool when one process dies, and cannot stop a task that hangs. Here a file that
crashes a decoder, eats the memory or never ends costs that file. Workers write nothing to the terminal, since libraries
quote paths and values in their messages.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError

_IMPORTS_BYTES = 512 * 2**20
"""Room beyond the limit for the libraries themselves."""


@dataclass(frozen=True)
class Limits:
    """What each worker may take."""

    workers: int
    memory_bytes: int
    """For one file or series, held by the kernel (Linux)."""
    seconds: float
    """For one file or series."""

    @property
    def voxels(self) -> int:
        """Most voxels that a header may announce: reading one takes some 16 bytes at its worst."""
        return self.memory_bytes // 16


class Runner(Protocol):
    """Where tasks are worked on: `Pool` on this machine, `ray_pool.RayPool` on many."""

    @property
    def limits(self) -> Limits: ...

    def run(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]: ...


class Pool:
    """Workers that stay for several rounds of tasks. A context manager: its end is theirs."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, _Worker] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            worker.stop()
        self._idle, self._busy = [], {}

    def run(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Calls `function` with each task in some worker; yields (index, result or Refused) as tasks end.

        `function` must be importable. What it raises becomes Refused, but a UserError is raised here. One round at a
        time.
        """
        left = enumerate(tasks)
        try:
            while True:
                while len(self._busy) < self.limits.workers and (task := next(left, None)) is not None:
                    worker = self._idle.pop() if self._idle else _Worker(self._context, self.limits)
                    self._busy[worker.connection] = worker
                    worker.give(function, *task)
                if not self._busy:
                    return
                yield from self._ended()
        finally:  # a round that is given up leaves nothing running
            for worker in self._busy.values():
                worker.stop()
            self._busy = {}

    def _ended(self) -> list[tuple[int, Any]]:
        """Waits until a task ends or is late; those that did, with their results."""
        soonest = max(0.0, min(worker.deadline for worker in self._busy.values()) - time.monotonic())
        ready = wait(list(self._busy), timeout=soonest)
        ended = []
        for connection, worker in list(self._busy.items()):
            if connection in ready:
                outcome = worker.take()
            elif time.monotonic() >= worker.deadline:
                outcome = worker.late()
            else:
                continue
            del self._busy[connection]
            if not worker.dead:
                self._idle.append(worker)
            ended.append((worker.index, outcome))
        return ended


class _Worker:
    """A process and what it is doing."""

    def __init__(self, context: Any, limits: Limits):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, limits.memory_bytes), daemon=True)
        self.process.start()
        theirs.close()
        self.index, self.deadline, self.dead, self._limits = -1, 0.0, False, limits

    def give(self, function: Callable, index: int, task: Any) -> None:
        self.index, self.deadline = index, time.monotonic() + self._limits.seconds
        with suppress(BrokenPipeError, ConnectionResetError):  # it died before it began; `take` will find out
            self.connection.send((function, task))

    def take(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self.stop()
            code = self.process.exitcode or 0
            if code == -signal.SIGKILL:
                return Refused("out_of_memory", "the system ended its reader, which happens when memory runs out")
            return Refused("crashed", f"its reader ended with status {code}")
        if kind == "user":
            raise UserError(value)
        if kind == "refused":
            return Refused(*value)
        if kind == "memory":
            return Refused("out_of_memory", f"it needs more than {self._limits.memory_bytes / 2**30:.3g} GiB to read")
        return value

    def late(self) -> Refused:
        self.stop()
        return Refused("timeout", f"it was not read in {self._limits.seconds:g} seconds")

    def stop(self) -> None:
        self.dead = True
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, memory_bytes: int) -> None:
    """The worker's life: task in, result out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    _limit_memory(memory_bytes + _IMPORTS_BYTES)
    while True:
        try:
            function, task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("ok", function(task))
        except Refused as refused:
            answer = ("refused", (refused.reason, refused.detail))
        except UserError as error:
            answer = ("user", str(error))
        except MemoryError:
            answer = ("memory", None)
        except Exception as error:
            answer = ("refused", ("crashed", f"its reader stopped ({type(error).__name__})"))
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


def _limit_memory(more_bytes: int) -> None:
    """Lets this process take so many bytes more than now. Linux counts private mappings; elsewhere nothing is held."""
    try:
        import resource
        from pathlib import Path

        status = Path("/proc/self/status").read_text()
        now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (now + more_bytes, now + more_bytes))
    except (ImportError, OSError, StopIteration, ValueError):
        return
