"""Processes that read batches, for studies so small that Python is what they cost.

Each is given whole batches in turn as a few numbers (`reading.Studies`) and writes them into memory that it shares with
this process, so no voxel passes a pipe and TensorStore decodes into place. The memory is anonymous (`memfd_create`): it
has no name to be left behind, and `/dev/shm`, 64 MB in a container, is not asked. A worker that dies is replaced and
reads its batches again, the same bytes. None imports JAX. `worker.py` is the other side.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from socket import send_fds, socket, socketpair
from typing import Any

import numpy as np

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.reading import Allocation, Studies
from mmfm_jax.data.parts import Batch, PackedShape
from mmfm_jax.errors import UserError

_DEATHS = 3  # of workers over one batch, until the batch is to blame


class Workers:
    """What `Reader` is, in other processes."""

    def __init__(
        self, samples: Samples, packed: Mapping[str, PackedShape], size: int, workers: int, threads: int, ahead: int
    ):
        """`threads` and the `ahead` batches are shared out. Raises UserError where processes cannot read the store."""
        if "memory://" in samples.store.url:
            raise UserError("data.workers: other processes cannot see a memory:// store; give 0")
        measured = Allocation()
        samples.room(size, packed, measured)
        self._room = (samples, packed, size, max(1, measured.size))
        each = max(1, threads // workers), -(-ahead // workers)
        self._workers = [_Worker((samples, packed, size, *each), ahead) for _ in range(workers)]
        for worker in self._workers:  # all import at once
            worker.set_up()
        self._turn = 0

    def begin(self, studies: Studies) -> _Pending:
        """The batch, once `result` is asked for it; batches are asked for in the order in which they were begun."""
        worker = self._workers[self._turn]
        self._turn = (self._turn + 1) % len(self._workers)
        return worker.begin(studies, self._room)

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        for worker in self._workers:
            worker.stop()


class _Shared:
    """Memory of one batch, shared with a worker."""

    def __init__(self, size: int):
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("mmfm-batch")
        else:
            with tempfile.TemporaryFile() as file:  # that has no name either
                self.file = os.dup(file.fileno())
        os.ftruncate(self.file, size)
        self.memory = mmap.mmap(self.file, size)

    def __del__(self) -> None:
        os.close(self.file)


class _Pending:
    """A batch that a worker reads."""

    def __init__(self, worker: _Worker, studies: Studies, number: int, room: tuple):
        self._worker, self.studies, self.number, self._room = worker, studies, number, room
        self.deaths = 0

    def result(self) -> Batch:
        """Raises what the worker raised, or UserError when it dies time and again."""
        self._worker.finish(self)
        return self._worker.taken(self.number, self._room)


class _Worker:
    """One process, the batches that it is to read, and the memory that it knows by number."""

    def __init__(self, setup: tuple, keep: int):
        self._setup, self._keep = setup, keep
        self._shared: dict[int, _Shared] = {}
        self._free: deque[int] = deque()
        self._under_way: deque[_Pending] = deque()
        self._made = 0
        self._start()

    def begin(self, studies: Studies, room: tuple) -> _Pending:
        while len(self._free) > self._keep:  # whoever held many batches at a time let them go
            number = self._free.popleft()
            del self._shared[number]
            self._tell("forget", number)
        number = self._free.pop() if self._free else self._share(room[-1])
        pending = _Pending(self, studies, number, room)
        self._under_way.append(pending)
        self._tell("read", number, studies)
        return pending

    def finish(self, pending: _Pending) -> None:
        assert pending is self._under_way[0]
        while True:
            try:
                error = self._connection.recv()
                break
            except (EOFError, OSError):
                self._replace(pending)
        self._under_way.popleft()
        if error is not None:
            self._free.append(pending.number)
            raise error

    def taken(self, number: int, room: tuple) -> Batch:
        """The batch in some memory, which is free again when none of its arrays is left."""
        samples, packed, size, _ = room
        block = np.frombuffer(self._shared[number].memory, np.uint8)
        weakref.finalize(block, self._free.append, number).atexit = False
        return samples.room(size, packed, Allocation(block))

    def set_up(self) -> None:
        self._tell(*self._setup)

    def stop(self) -> None:
        self._process.kill()  # it keeps nothing that could be left half done
        self._process.wait()
        self._connection.close()

    def _start(self) -> None:
        ours, theirs = socketpair()
        with theirs:
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mmfm_jax.data.feed.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
            )
        self._connection = Connection(ours.detach())

    def _replace(self, pending: _Pending) -> None:
        """A new process in the place of one that died, with all that it was to do."""
        self.stop()
        pending.deaths += 1
        code = self._process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        if pending.deaths >= _DEATHS:
            raise UserError(
                f"data.workers: a process that reads studies {how}, {_DEATHS} times over one batch; if memory ran out, "
                "lower data.workers, data.prefetch_batches or data.cache_bytes"
            )
        print(f"mmfm: a process that reads studies {how} and is replaced", file=sys.stderr, flush=True)
        self._start()
        self.set_up()
        for number in self._shared:
            self._hand(number)
        for waiting in self._under_way:
            self._tell("read", waiting.number, waiting.studies)

    def _share(self, size: int) -> int:
        number, self._made = self._made, self._made + 1
        self._shared[number] = _Shared(size)
        self._hand(number)
        return number

    def _hand(self, number: int) -> None:
        self._tell("share", number)
        channel = socket(fileno=os.dup(self._connection.fileno()))
        with channel, suppress(BrokenPipeError, ConnectionResetError):
            send_fds(channel, [b"."], [self._shared[number].file])

    def _tell(self, *message: Any) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it died; `finish` will find out
            self._connection.send(message)
