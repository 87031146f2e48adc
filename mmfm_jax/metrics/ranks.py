"""Where queries find their partners in a gallery, by inner products that no order of summing changes.

Vectors are rounded to whole multiples of one step, some 2^-14 of the longest, and multiplied as integers. So a score is
the same on every device and in every block, and equal vectors tie exactly: with rounding errors of a float32 product, a
model that maps all studies to one point would find its partners by their places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Int32, Num, Shaped

BLOCK = 4096  # queries, and entries of the gallery, that a device compares at once
LEAST = 64  # so that small galleries share a compiled block
LONGEST = 127 * 256  # steps of the longest vector: two digits of 8 bits, and products below 2^31


@dataclass(frozen=True)
class Ranks:
    """Where each query finds its own partner in the gallery, were equal scores put in random order. NaN: nowhere."""

    above: Num[np.ndarray, "query"]
    """Gallery entries that score higher than the partner."""
    tied: Num[np.ndarray, "query"]
    """Other entries that score the same."""

    @property
    def expected(self) -> Float[np.ndarray, "query"]:
        """Expected rank, the best being 1."""
        return 1 + self.above + self.tied / 2

    def found(self, k: int) -> Float[np.ndarray, "query"]:
        """Chance that the partner is among the first k: its rank is uniform over above+1 ... above+tied+1."""
        return np.clip(k - self.above, 0, self.tied + 1) / (self.tied + 1)


def retrieval_ranks(
    query: Float[np.ndarray, "study width"],
    gallery: Float[np.ndarray, "study width"],
    same: Shaped[np.ndarray, "study"],
) -> Ranks:
    """Ranks of each study's own gallery entry by inner product, computed in blocks on the first device.

    Entries that share a number in `same` come from equal inputs (two reports in the same words): they are exact ties,
    whatever rounding did to their embeddings, so nothing is won by the luck of the order. Of others, those tie whose
    scores are equal in steps. One vector that is not finite leaves no rank defined: all are NaN.
    """
    if not (np.isfinite(query).all() and np.isfinite(gallery).all()):
        return Ranks(np.full(len(query), np.nan), np.full(len(query), np.nan))
    _, first, entry, count = np.unique(same, return_index=True, return_inverse=True, return_counts=True)
    asked, held = in_steps(query), in_steps(gallery[first])
    size = min(max(1 << (len(query) - 1).bit_length(), LEAST), BLOCK)
    above, tied = np.empty(len(query), int), np.empty(len(query), int)
    for start in range(0, len(query), size):
        block = slice(start, start + size)
        own = np.einsum("qw,qw->q", asked[block], held[entry[block]], dtype=np.int32)
        digits, own = _digits(asked[block], size), _padded(own, size)
        found = np.zeros((2, size), int)
        for at in range(0, len(held), size):
            of_gallery = slice(at, at + size)
            found += np.asarray(
                _compare(digits, own, _digits(held[of_gallery], size), _padded(count[of_gallery], size))
            )
        above[block], tied[block] = found[:, : len(query) - start]
    return Ranks(above, tied - 1)  # an entry ties with itself


def in_steps(vectors: Float[np.ndarray, "study width"]) -> Int[np.ndarray, "study width"]:
    """Vectors as whole multiples of the power of two in which the longest takes at most LONGEST, and half that."""
    longest = math.sqrt(np.einsum("sw,sw->s", vectors, vectors, dtype=np.float64).max()) or 1.0
    steps = np.ldexp(vectors, math.floor(math.log2(LONGEST / longest)))
    return np.rint(steps, out=steps).astype(np.int16)


def _digits(steps: Int[np.ndarray, "study width"], rows: int) -> Int8[np.ndarray, "rows 2 width"]:
    """Two digits to the base of 256, the lower from -128 to 127; rows of zeros follow."""
    high = (steps.astype(np.int32) + 128) >> 8
    return _padded(np.stack([high, steps - 256 * high], axis=1).astype(np.int8), rows)


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


@jax.jit
def _compare(
    query: Int8[Array, "query 2 width"],
    own: Int32[Array, "query"],
    gallery: Int8[Array, "entry 2 width"],
    count: Int[Array, "entry"],
) -> Int32[Array, "2 query"]:
    """How many studies score above `own`, and how many the same; each entry stands for `count` of them."""
    product = jnp.einsum("qiw,ejw->ijqe", query, gallery, preferred_element_type=jnp.int32)
    # Terms may pass 2^31 and wrap; their sum does not, so it is right.
    score = 65536 * product[0, 0] + 256 * (product[0, 1] + product[1, 0]) + product[1, 1]
    own = own[:, None]
    return jnp.stack([jnp.where(score > own, count, 0).sum(axis=1), jnp.where(score == own, count, 0).sum(axis=1)])
