"""Studies of a store as batches, in an order that is a function of (data config, seed, step) alone.

Element i of the endless training order is the same on every host, thread and restart, and any element can be read
without the ones before it. So each process reads only its own rows of a global batch, and a run resumes from a step
number.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import grain
import jax
import numpy as np

from mmfm_jax.data.batch import Batch, PackedShape
from mmfm_jax.data.feed import packing
from mmfm_jax.data.feed.example import ABSENT, Begun, Drawn, Samples


def local_batches(
    dataset: grain.MapDataset[Drawn],
    batch_size: int,
    local_rows: np.ndarray,
    start_step: int,
    threads: int,
    prefetch: int,
    packed: Mapping[str, PackedShape] | None = None,
) -> Generator[Batch, None, None]:
    """The rows `local_rows` (of `range(batch_size)`) of each global batch from `start_step` on, without end.

    `packed`: how images share rows of tokens, by role (`Samples.packed`); `local_rows` parts no such row. `threads`
    read up to `prefetch` batches ahead; neither changes the batches. Closing the generator stops them. What a reader
    raises is raised here.
    """
    rows = np.asarray(local_rows)

    def draw(index: int) -> Drawn:
        step, i = divmod(index, len(rows))
        return cast(Drawn, dataset[(start_step + step) * batch_size + int(rows[i])])

    return _read_ahead(draw, sys.maxsize, len(rows), threads, prefetch, packed or {})


def evaluation_batches(
    samples: Samples,
    split: str,
    batch_size: int,
    local_rows: np.ndarray,
    limit: int | None = None,
    threads: int = 8,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Every study of the split once (the first `limit` of them), in store order, read without randomness.

    The last batch is filled with absent studies (`study` -1), so all processes yield equally many batches of one
    shape. Raises UserError when the split has no patients.
    """
    rows = samples.store.rows(split)[:limit]
    padded = np.full(-(-len(rows) // batch_size) * batch_size, ABSENT)
    padded[: len(rows)] = rows
    local = padded.reshape(-1, batch_size)[:, local_rows].reshape(-1)

    def draw(index: int) -> Drawn:
        row = int(local[index])
        return samples.absent() if row == ABSENT else samples.draw(row, None)

    return _read_ahead(draw, len(local), len(local_rows), threads, prefetch, samples.whole)


def batch_checksum(batch: Batch) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all leaves, for comparing batches between runs and hosts."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class _Reading(grain.MapDataset[list[Begun]]):
    """The studies that a process reads, `group` of them an element, each into its place in a batch of `size`.

    Threads may ask for elements in any order, each once. The room of a batch is made when its first study is read.
    """

    def __init__(self, draw: Callable[[int], Drawn], length: int, size: int, group: int):
        super().__init__()
        self._draw, self._length, self._size, self._group = draw, length // group, size, group
        self._room: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._joined = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> list[Begun]:
        return [self._begin(i) for i in range(index * self._group, (index + 1) * self._group)]

    def _begin(self, index: int) -> Begun:
        drawn, (batch, place) = self._draw(index), divmod(index, self._size)
        with self._lock:
            if batch not in self._room:
                self._room[batch] = drawn.samples.voxels(self._size)
            room = self._room[batch]
        return drawn.begin({role: voxels[place] for role, voxels in room.items()})

    def joined(self, elements: Sequence[list[Begun]], packed: Mapping[str, PackedShape]) -> Batch:
        """The studies of the next batch, once all their voxels are there."""
        studies = [begun for element in elements for begun in element]
        for begun in studies:
            begun.wait()
        room, self._joined = self._room.pop(self._joined), self._joined + 1
        return stack([begun.study for begun in studies], room, packed)


def _read_ahead(
    draw: Callable[[int], Drawn], length: int, size: int, threads: int, prefetch: int, packed: Mapping[str, PackedShape]
) -> Generator[Batch, None, None]:
    """Studies in batches of `size`, `prefetch` of them ahead, the first of which is already put together.

    Threads begin to read some studies at a time, as many as leave each two turns, and TensorStore reads many at once,
    so the first batch comes as soon as it can.
    """
    ahead = max(threads, (prefetch - 1) * size)
    group = max(n for n in range(1, size + 1) if size % n == 0 and (n == 1 or 2 * threads * n <= ahead))
    reading = _Reading(draw, length, size, group)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead // group))
    joined = functools.partial(reading.joined, packed=packed)
    yield from _one_ahead(iter(reading.to_iter_dataset(options).batch(size // group, batch_fn=joined)))


def _one_ahead(batches: Any) -> Generator[Batch, None, None]:
    """`batches`, the next of which a thread puts together while the step runs: copying volumes side by side is slow."""
    try:
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = pool.submit(next, batches, None)
                yield batch
    finally:  # after the one under way, for which the pool waits
        batches.close()


def stack(studies: Sequence[Batch], voxels: Mapping[str, np.ndarray], packed: Mapping[str, PackedShape]) -> Batch:
    """Unbatched studies as a batch, the images of `packed` roles in rows of tokens.

    `voxels`: those of the other roles, which already stand side by side.
    """
    small = [
        replace(study, images={role: replace(part, voxels=0) for role, part in study.images.items()}, packed={})
        for study in studies
    ]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *small)
    return replace(
        batch,
        images={role: replace(part, voxels=voxels[role]) for role, part in batch.images.items()},
        packed={
            role: packing.pack([study.packed[role] for study in studies], shape.studies, shape.tokens)
            for role, shape in packed.items()
        },
    )
