"""One run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmfm_jax.errors import UserError
from mmfm_jax.files import open_own
from mmfm_jax.train.place import LOCK


class RunLock:
    """Held by the first process of a run for all of them, from `take` to `close` or until that process ends.

    It is the operating system's lock on an open file (flock; over NFS a lock of the server's), so that a killed process
    leaves none behind. Where a file system has no locks, nothing is locked.
    """

    def __init__(self, run: Path):
        self._run = run
        self._file: int | None = None

    def take(self) -> None:
        """Makes the folder if need be; raises UserError, in all processes, when another run holds it."""
        holder = self._try() if jax.process_index() == 0 else None
        free = holder is None
        if jax.process_count() > 1:
            free = bool(multihost_utils.broadcast_one_to_all(np.asarray(free)))
        if not free:
            raise UserError(
                f"{self._run}: another run trains into this folder{f' ({holder})' if holder else ''}; wait for its end "
                "or stop it, or give another --run"
            )

    def _try(self) -> str | None:
        """None where the lock was taken, else who holds it."""
        self._run.mkdir(parents=True, exist_ok=True)
        try:
            file = open_own(self._run / LOCK, os.O_RDWR)
        except OSError as error:
            raise UserError(f"{self._run / LOCK}: cannot be written: {error.strerror or error}; remove it") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                with os.fdopen(file, "r", errors="replace") as held:
                    return held.read(200).strip() or "of an unknown process"
            os.close(file)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._file = file
        return None

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)  # and with it goes the lock; the file stays, since another may just have opened it
            self._file = None
