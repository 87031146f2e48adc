"""Memory of batches that goes round: what a finished batch has left, a later one is given."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import defaultdict, deque

import numpy as np


class _Lent(np.ndarray):
    """The one array on a block. Views of it keep it alive, and when the last of them is gone so is it."""


class Recycled:
    """Arrays on blocks that are used again, since the kernel clears each new page of a batch: of whole volumes, a sixth
    of the time of the cores that read them. It holds as many blocks as were in use at once."""

    def __init__(self):
        self._free: dict[int, deque[mmap.mmap]] = defaultdict(deque)

    def empty(self, shape: tuple[int, ...], dtype: str | np.dtype) -> np.ndarray:
        """As `numpy.empty`: what stands there is not set. The block returns once no view of the array is left, JAX's
        among them."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        try:
            block = self._free[size].pop()  # of a deque: other threads may do the same
        except IndexError:
            block = mmap.mmap(-1, max(size, 1))
        lent = np.ndarray.__new__(_Lent, (size,), np.uint8, buffer=block)
        weakref.finalize(lent, self._free[size].append, block).atexit = False
        return lent.view(np.ndarray).view(kind).reshape(shape)
