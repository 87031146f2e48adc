"""Images that cannot be read: each counts as absent, is told once, and too many of them end the run."""

from __future__ import annotations

import threading
import warnings

from mmfm_jax.data.store.study_store import DamagedImage
from mmfm_jax.errors import UserError


class Damage:
    """The damaged images that a process has met, up to `limit` of them. Safe to use from many threads."""

    def __init__(self, limit: int = 0):
        self.limit = limit
        self._met: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Damage, (self.limit,)  # each process counts its own

    def __len__(self) -> int:
        return len(self._met)

    def leave_out(self, role: str, row: int, error: DamagedImage) -> None:
        """Counts an image and warns of it. Raises UserError when it is one too many, what was met with a limit of 0."""
        if not self.limit:
            raise error
        with self._lock:
            if (role, row) in self._met:
                return
            self._met.add((role, row))
            count = len(self._met)
        if count > self.limit:
            raise UserError(
                f"{error}; it is image {count} that could not be read, and data.max_damaged allows {self.limit}"
            ) from error
        warnings.warn(f"{error}; study {row} goes on without its image {role}", stacklevel=2)
