"""A process that reads batches for another one (`workers.py`) until that one closes the connection, or dies."""

from __future__ import annotations

import mmap
import os
import queue
import signal
import sys
import threading
import traceback
from concurrent.futures import Future
from multiprocessing.connection import Connection
from socket import recv_fds, socket
from typing import Any

import numpy as np

from mmfm_jax.data.feed.reading import Allocation, Reader
from mmfm_jax.data.parts import Batch


def main(file: int) -> None:
    """Reads what is asked for over the socket `file`; answers None for each batch in turn, or what it raised."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group; the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    connection, answers = Connection(file), queue.SimpleQueue[Future[Any]]()
    threading.Thread(target=_answer, args=(connection, answers), daemon=True).start()
    try:
        _serve(connection, answers)
    except (EOFError, OSError):
        os._exit(0)  # threads may be reading still


def _serve(connection: Connection, answers: queue.SimpleQueue[Future[Any]]) -> None:
    rooms: dict[int, Batch] = {}
    try:
        samples, packed, size, threads, ahead = connection.recv()  # which opens the store
    except (EOFError, ConnectionError):
        raise
    except Exception as error:  # whatever it is, the parent is told, and raises it
        samples, failed = None, error
    else:
        reader = Reader(samples, packed, size, threads, ahead)
    while True:
        kind, number, *asked = connection.recv()
        if kind == "share":
            with socket(fileno=os.dup(connection.fileno())) as channel:
                (shared,) = recv_fds(channel, 1, 1)[1]
            if samples is not None:
                memory = mmap.mmap(shared, os.fstat(shared).st_size)
                rooms[number] = samples.room(size, packed, Allocation(np.frombuffer(memory, np.uint8)))
            os.close(shared)
        elif kind == "forget":
            rooms.pop(number, None)
        elif samples is None:
            pending: Future[Any] = Future()
            pending.set_exception(failed)
            answers.put(pending)
        else:
            answers.put(reader.begin(asked[0], rooms[number]))


def _answer(connection: Connection, answers: queue.SimpleQueue[Future[Any]]) -> None:
    while True:
        error = answers.get().exception()
        try:
            connection.send(error)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception:  # not every error can be pickled, and pickle raises what it will: the parent gets its words
            connection.send(RuntimeError("".join(traceback.format_exception(error))))


if __name__ == "__main__":
    main(int(sys.argv[1]))
