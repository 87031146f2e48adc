"""Batches of studies, read by threads into arrays made beforehand; without JAX, for worker processes read so too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mmfm_jax.data.feed.example import ABSENT, Begun, Samples
from mmfm_jax.data.parts import Batch, PackedShape


@dataclass(frozen=True)
class Studies:
    """What a batch is made of: a few numbers a study, from which any process reads the same bytes."""

    rows: np.ndarray
    """int64 [study], -1 for none."""
    key: int | None
    """Of all that is drawn; None draws nothing."""
    indices: np.ndarray
    """int64 [study]: the position of each in the order. What is drawn of a study is a function of (key, index)."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice) -> Studies:
        return Studies(self.rows[some], self.key, self.indices[some])


def generators(studies: Studies) -> Iterator[np.random.Generator | None]:
    """The generator of each study, to be used before the next is asked for.

    One Philox (Salmon et al., 2011) whose counter is set to the study's index: making a generator costs 20 times more.
    """
    if studies.key is None:
        yield from [None] * len(studies)
        return
    philox = np.random.Philox(key=studies.key)
    generator, state = np.random.Generator(philox), philox.state
    for index in studies.indices.tolist():
        state["state"]["counter"][:] = 0, 0, index, 0
        philox.state = state
        yield generator


class Allocation:
    """Arrays one after another, out of one block of memory or, without one, each by itself."""

    def __init__(self, block: np.ndarray | None = None):
        self._block, self.size = block, 0

    def __call__(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        first, size = self.size, math.prod(shape) * np.dtype(dtype).itemsize
        self.size += -(-size // 64) * 64
        if self._block is None:
            return np.empty(shape, dtype)
        return self._block[first : first + size].view(dtype).reshape(shape)


class Reader:
    """Threads that read batches of `size` studies; `packed` as for `local_batches`.

    Threads begin to read some studies at a time and TensorStore reads them; one thread more waits for what was begun,
    batch after batch.
    """

    def __init__(self, samples: Samples, packed: Mapping[str, PackedShape], size: int, threads: int, ahead: int):
        self._samples, self._packed, self._size = samples, packed, size
        # Few enough at a time that each thread has two turns in what is read ahead, so that none waits for another.
        most = max(1, max(threads, (ahead - 1) * size) // (2 * threads))
        self._group = max(n for n in range(1, size + 1) if size % n == 0 and n <= most)
        self._threads = ThreadPoolExecutor(threads, "mmfm-read")
        self._joiner = ThreadPoolExecutor(1, "mmfm-join")

    def begin(self, studies: Studies, room: Batch | None = None) -> Future[Batch]:
        """The batch, once it is there; in the arrays of `room` where it is given."""
        into = room or self._samples.room(self._size, self._packed, Allocation())
        begun = [
            self._threads.submit(self._begin, studies[first : first + self._group], into, first)
            for first in range(0, self._size, self._group)
        ]
        return self._joiner.submit(self._join, begun, into)

    def close(self) -> None:
        """Waits for what threads are doing and leaves the rest undone."""
        for pool in (self._threads, self._joiner):
            pool.shutdown(cancel_futures=True)

    def _begin(self, studies: Studies, room: Batch, first: int) -> Begun:
        samples = self._samples
        drawn = [
            samples.absent() if row == ABSENT else samples.draw(row, rng)
            for row, rng in zip(studies.rows.tolist(), generators(studies))
        ]
        return samples.begin(drawn, room, first)

    def _join(self, begun: list[Future[Begun]], room: Batch) -> Batch:
        self._samples.join([group.result() for group in begun], room)
        return room
