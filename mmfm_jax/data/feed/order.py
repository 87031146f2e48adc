"""The endless order in which training meets the studies of a store: any element without the ones before it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import cast

import grain
import numpy as np

from mmfm_jax.data.feed.example import Drawn, Samples
from mmfm_jax.data.feed.reading import Studies, generators
from mmfm_jax.data.store.mix import sources

_FEW = 65_536  # studies of a split whose epochs are permuted in memory, 256 KiB each
_LEAST_SHARE = 100  # of a store of a mix: weights are kept to a hundredth of the smallest


class TrainingOrder:
    """Element i is the study at global position i, drawn with a generator of (seed, i).

    Each epoch holds every study of the split once, in an order of its own. The order is a block cipher on the index
    (grain's index_shuffle), not a permutation in memory: the split takes 4 bytes a study.
    Of a mix, each store has an order and epochs of its own, and any n studies in a row hold each store's share of n, to
    the nearest whole study.
    """

    def __init__(self, samples: Samples, split: str, seed: int):
        """Raises UserError when the split has no patients."""
        self.samples = samples
        parts = sources(samples.store, split)
        # Hashed, because epoch e is shuffled with (order + e): neighbouring seeds would repeat each other's epochs.
        seeds = np.random.SeedSequence(seed).generate_state(2 * len(parts)).reshape(-1, 2).tolist()
        self._orders = [_shuffled(rows.astype(np.uint32), order) for (_, rows), (order, _) in zip(parts, seeds)]
        least = min(weight for weight, _ in parts)
        self._shares = [int(_LEAST_SHARE * weight / least) for weight, _ in parts]
        self._draws = seeds[0][1]

    def studies(self, indices: Sequence[int] | np.ndarray) -> Studies:
        """Those at some positions."""
        if len(self._orders) == 1:
            rows = [self._orders[0][int(i)] for i in indices]
        else:
            rows = [self._orders[store][at] for store, at in (_interleaved(int(i), self._shares) for i in indices)]
        return Studies(np.asarray(rows, np.int64), self._draws, np.asarray(indices, np.int64))

    def __getitem__(self, index: int) -> Drawn:
        """The study at a position, all but its voxels read."""
        studies = self.studies([index])
        return self.samples.draw(int(studies.rows[0]), next(generators(studies)))


def training_rows(samples: Samples, split: str, seed: int) -> TrainingOrder:
    """The endless training order. Raises UserError when the split has no patients."""
    return TrainingOrder(samples, split, seed)


def _interleaved(index: int, shares: Sequence[int]) -> tuple[int, int]:
    """Which store gives the study at a position of a mix, and its position among those of that store.

    The first n studies of what is left hold n * rest / (share + rest), rounded down, of all stores but the next.
    """
    first, last, left = index, index + 1, sum(shares)
    for store, share in enumerate(shares):
        others, others_after = (n * (left - share) // left for n in (first, last))
        if first - others != last - others_after:
            return store, first - others
        first, last, left = others, others_after, left - share
    raise AssertionError("the last store takes what is left")


def _shuffled(rows: np.ndarray, seed: int) -> Sequence[int]:
    if len(rows) < _FEW:
        return cast(Sequence[int], _FewRows(rows, seed))
    return cast(Sequence[int], grain.MapDataset.source(cast(Sequence[int], rows)).shuffle(seed).repeat())


class _FewRows:
    """The endless order of a small split. grain's cipher is of 16 bits at least and tries again until it lands within
    the split, which takes 65,536 / studies turns: 3 ms a study for a split of 8."""

    def __init__(self, rows: np.ndarray, seed: int):
        self._rows = rows
        self._epoch = functools.lru_cache(4)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(rows))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, at = divmod(index, len(self._rows))
        return self._epoch(epoch)[at]
