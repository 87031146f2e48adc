"""Studies of a store as batches, in an order that is a function of (data config, seed, step) alone.

Element i of the endless training order is the same on every host, process, thread and restart, and any element can be
read without the ones before it. So each host reads only its own rows of a global batch, and a run resumes from a step
number.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator, Mapping

import jax
import numpy as np

from mmfm_jax.data.batch import Batch, PackedShape
from mmfm_jax.data.feed.example import ABSENT, Samples
from mmfm_jax.data.feed.order import TrainingOrder
from mmfm_jax.data.feed.reading import Reader, Studies
from mmfm_jax.data.feed.workers import Workers


def local_batches(
    order: TrainingOrder,
    batch_size: int,
    local_rows: np.ndarray,
    start_step: int,
    threads: int,
    prefetch: int,
    packed: Mapping[str, PackedShape] | None = None,
    workers: int = 0,
) -> Generator[Batch, None, None]:
    """The rows `local_rows` (of `range(batch_size)`) of each global batch from `start_step` on, without end.

    `packed`: how images share rows of tokens, by role (`Samples.packed`); `local_rows` parts no such row. `threads`
    read up to `prefetch` batches ahead, in this process or in `workers` others; none of these changes the batches.
    Closing the generator stops them. What a reader raises is raised here.
    """
    rows = np.asarray(local_rows)
    steps = (order.studies(step * batch_size + rows) for step in itertools.count(start_step))
    return _read_ahead(order.samples, steps, len(rows), threads, prefetch, packed or {}, workers)


def evaluation_batches(
    samples: Samples,
    split: str,
    batch_size: int,
    local_rows: np.ndarray,
    limit: int | None = None,
    threads: int = 8,
    prefetch: int = 2,
    workers: int = 0,
    studies: np.ndarray | None = None,
) -> Generator[Batch, None, None]:
    """Every study of the split once (the first `limit` of them, or the rows `studies`), in store order, read without
    randomness.

    The last batch is filled with absent studies (`study` -1), so all processes yield equally many batches of one
    shape. Raises UserError when the split has no patients.
    """
    rows = samples.store.rows(split)[:limit] if studies is None else studies
    padded = np.full(-(-len(rows) // batch_size) * batch_size, ABSENT)
    padded[: len(rows)] = rows
    local = padded.reshape(-1, batch_size)[:, local_rows]
    batches = (Studies(of_batch, None, of_batch) for of_batch in local)
    return _read_ahead(samples, batches, len(local_rows), threads, prefetch, samples.whole, workers)


def batch_checksum(batch: Batch) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all leaves, for comparing batches between runs and hosts."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read_ahead(
    samples: Samples,
    batches: Iterator[Studies],
    size: int,
    threads: int,
    prefetch: int,
    packed: Mapping[str, PackedShape],
    workers: int,
) -> Generator[Batch, None, None]:
    """Batches of `size` studies, `prefetch` of them ahead and at least two for each worker."""
    ahead = max(prefetch, 2 * workers)
    reader = (
        Workers(samples, packed, size, workers, threads, ahead)
        if workers
        else Reader(samples, packed, size, threads, ahead)
    )
    try:
        under_way = deque(map(reader.begin, itertools.islice(batches, ahead)))
        while under_way:
            batch = under_way.popleft().result()
            under_way.extend(map(reader.begin, itertools.islice(batches, 1)))
            yield batch
            del batch  # whoever has it may be done with it before the next is there
    finally:
        reader.close()
