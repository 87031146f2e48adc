"""The global batches that a run trains on."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from mmfm_jax.data.batch import Batch
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.train.clock import Clock


class Batches:
    """The global batches of a run from a step on, in order and for ever."""

    def __init__(self, experiment: Experiment, samples: Samples, mesh: Mesh, first: int, clock: Clock):
        """`first`: steps that were taken before."""
        self._size, self._mesh, self._clock = experiment.train.batch_size, mesh, clock
        self.rows: np.ndarray = sharding.local_rows(self._size, mesh)
        """Those of the global batch that this process reads."""
        data = experiment.data
        self.ahead = max(data.prefetch_batches, 2 * data.workers)
        """Batches that are read ahead."""
        self._local = local_batches(
            training_rows(samples, "train", experiment.seed), self._size, self.rows, first, data.reader_threads,
            data.prefetch_batches, samples.packed, data.workers,
        )  # fmt: skip

    def __next__(self) -> Batch:
        with self._clock("data"):
            local = next(self._local)
        return sharding.global_batch(local, self.rows, self._size, self._mesh)

    def close(self) -> None:
        self._local.close()
