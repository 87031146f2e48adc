"""Finding a study's partner among those of the other modality."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from mmfm_jax.data.split import digest
from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.ranks import Ranks, retrieval_ranks
from mmfm_jax.metrics.statistics import Measure, chance, weighted_mean, weighted_median


@dataclass(frozen=True)
class Side:
    """Unit vectors of one modality of the studies of a split."""

    vectors: Float[np.ndarray, "study width"]
    """Meaningless where not present."""
    present: Bool[np.ndarray, "study"]
    same: Shaped[np.ndarray, "study"]
    """Studies whose inputs are identical share a value."""


@dataclass(frozen=True)
class Gallery:
    """The studies that are looked for, each by its own: all that hold both modalities, or those drawn of them."""

    studies: Int[np.ndarray, "study"]
    """Places in the split, ascending."""
    of: int
    """How many hold both."""

    @property
    def drawn(self) -> bool:
        return len(self.studies) < self.of


def gallery(present: Bool[np.ndarray, "study"], patients: Shaped[np.ndarray, "study"], most: int) -> Gallery:
    """The studies `present`; of more than `most`, that many of the patients that come first by a keyed hash.

    So it is the same for every run, task and seed, a smaller one is part of a larger one, and a patient's studies stay
    together (but for the last patient's).
    """
    held = np.flatnonzero(present)
    if len(held) <= most:
        return Gallery(held, len(held))
    unique, patient = np.unique(patients[held], return_inverse=True)
    order = np.argsort([digest(str(name), "mmfm", "gallery") for name in unique])
    place = np.empty(len(unique), int)
    place[order] = np.arange(len(unique))
    return Gallery(np.sort(held[np.argsort(place[patient], kind="stable")[:most]]), len(held))


def ranks_both_ways(sides: dict[str, Side], among: Gallery) -> dict[str, Ranks]:
    """By `A_to_B`: where each study's own B stands among those of the gallery. Identical entries are ties."""
    (a, first), (b, second) = sides.items()
    return {
        f"{source}_to_{target}": retrieval_ranks(
            query.vectors[among.studies], held.vectors[among.studies], held.same[among.studies]
        )
        for source, query, target, held in ((a, first, b, second), (b, second, a, first))
    }


def retrieval(
    ways: dict[str, Ranks],
    patients: Shaped[np.ndarray, "study"],
    among: Gallery,
    recall_at: tuple[int, ...],
    bootstrap: Bootstrap,
) -> dict[str, Measure]:
    """Recall@k and median rank of each way, with their chance levels.

    `patients`: of the split. A resample draws queries from the gallery, which stays whole; `n` is its size. Of a drawn
    gallery, `gallery_share` is the share of the studies that could have been in it.
    """
    n, measures = len(among.studies), {}
    patients = patients[among.studies]
    for way, ranks in ways.items():
        for k in recall_at:
            measures[f"{way}/recall@{k}"] = bootstrap(functools.partial(weighted_mean, ranks.found(k)), patients)
            measures[f"{way}/recall@{k}_chance"] = chance(min(k / n, 1), n)
        measures[f"{way}/median_rank"] = bootstrap(functools.partial(weighted_median, ranks.expected), patients)
        measures[f"{way}/median_rank_chance"] = chance((n + 1) / 2, n)
        if among.drawn:
            measures[f"{way}/gallery_share"] = chance(n / among.of, n)
    return measures


def zero_shot(
    image: Float[np.ndarray, "study width"],
    positive: Float[np.ndarray, "prompt width"],
    negative: Float[np.ndarray, "prompt width"],
) -> Float[np.ndarray, "study 2"]:
    """Mean cosine similarity of the image to the positive prompts minus that to the negative ones.

    Given as two columns whose difference it is (they rank studies like log-odds, but are no probabilities). CLIP
    (arXiv:2103.00020) with mean prompt embeddings.
    """
    score = image @ (positive.mean(axis=0) - negative.mean(axis=0))
    return np.stack([np.zeros_like(score), score], axis=1)
