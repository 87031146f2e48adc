"""Finding a study's partner among those of the other modality."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped

from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.statistics import Measure, chance, retrieval_ranks, weighted_mean, weighted_median


@dataclass(frozen=True)
class Side:
    """Unit vectors of one modality of the studies of a split."""

    vectors: Float[np.ndarray, "study width"]
    """Meaningless where not present."""
    present: Bool[np.ndarray, "study"]
    same: Shaped[np.ndarray, "study"]
    """Studies whose inputs are identical share a value."""


def retrieval(
    sides: dict[str, Side], patients: np.ndarray, recall_at: tuple[int, ...], bootstrap: Bootstrap
) -> dict[str, Measure]:
    """Both ways between two modalities: recall@k and median rank, with their chance levels; `{}` of less than two.

    The gallery is every study that holds both modalities; a resample draws queries from it. Identical entries are
    ties, counted as their expected rank in random order.
    """
    (a, first), (b, second) = sides.items()
    both = first.present & second.present
    n = int(both.sum())
    if n < 2:
        return {}
    patients, measures = patients[both], {}
    for source, query, target, gallery in ((a, first, b, second), (b, second, a, first)):
        ranks = retrieval_ranks(query.vectors[both], gallery.vectors[both], gallery.same[both])
        way = f"{source}_to_{target}"
        for k in recall_at:
            measures[f"{way}/recall@{k}"] = bootstrap(functools.partial(weighted_mean, ranks.found(k)), patients)
            measures[f"{way}/recall@{k}_chance"] = chance(min(k / n, 1), n)
        measures[f"{way}/median_rank"] = bootstrap(functools.partial(weighted_median, ranks.expected), patients)
        measures[f"{way}/median_rank_chance"] = chance((n + 1) / 2, n)
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
