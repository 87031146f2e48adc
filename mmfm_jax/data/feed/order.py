"""The endless order in which training meets the studies of a store: any element without the ones before it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import cast

import grain
import numpy as np

from mmfm_jax.data.feed.example import Drawn, Samples
from mmfm_jax.data.store.mix import sources

_FEW = 1024  # studies of a split whose epochs are permuted in memory


def training_rows(samples: Samples, split: str, seed: int) -> grain.MapDataset[Drawn]:
    """The endless training order: element i is the study at global position i, drawn with a generator of (seed, i).

    Each epoch holds every study of the split once, in an order of its own. The order is a block cipher on the index
    (grain's index_shuffle), not a permutation in memory: the split takes 4 bytes a study.
    Of a mix, each store has an order and epochs of its own, and any n studies in a row hold each store's share of n, to
    the nearest whole study.
    Raises UserError when the split has no patients.
    """
    parts = sources(samples.store, split)
    # Hashed, because epoch e is shuffled with (order + e): neighbouring seeds would repeat each other's epochs.
    seeds = np.random.SeedSequence(seed).generate_state(2 * len(parts)).reshape(-1, 2).tolist()
    orders = [
        _shuffled(rows.astype(np.uint32), order).random_map(samples.draw, seed=draws)
        for (_, rows), (order, draws) in zip(parts, seeds)
    ]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [weight for weight, _ in parts])


def _shuffled(rows: np.ndarray, seed: int) -> grain.MapDataset:
    if len(rows) < _FEW:
        return grain.MapDataset.source(_FewRows(rows, seed))
    return grain.MapDataset.source(cast(Sequence[int], rows)).shuffle(seed).repeat()


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
