"""Which patches of an image masked modelling hides (MAE, arXiv:2111.06377): a share of each study's, at random."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from mmfm_jax.data.batch import Array, PackedPart


def hidden_of(patches: int, share: float) -> int:
    """How many of an image's patches are hidden: at least one, and never all."""
    return min(max(round(share * patches), 1), patches - 1) if patches else 0


def hide(part: PackedPart, share: float, most: int, keys: PRNGKeyArray) -> tuple[PackedPart, PackedPart]:
    """A part in two: the patches that stay, and those hidden, each in as few tokens as always suffice.

    `most`: patches of the largest image; `keys`: one a study [batch]. What is hidden of a study depends on its key and
    on the number of its patches, not on its neighbours.
    """
    score = jax.vmap(lambda key: jax.random.uniform(key, (most,)))(keys)
    hidden = lowest(part, score, np.array([hidden_of(n, share) for n in range(most + 1)]))
    stay, hide = rooms(part.patches.shape[1], part.studies, share)
    return take(part, part_of(part) & ~hidden, stay), take(part, hidden, hide)


def lowest(part: PackedPart, score: Float[Array, "batch most"], count: np.ndarray) -> Bool[Array, "row token"]:
    """The tokens of lowest score: of a study with n patches `count[n]`; its i-th patch has its i-th score."""
    rows, tokens = part.patches.shape[:2]
    segment = jnp.ones((rows, tokens), jnp.int32) if part.segment is None else part.segment
    held = (segment[:, None, :] == 1 + jnp.arange(part.studies)[:, None]).sum(axis=2)
    first = part.by_token((jnp.cumsum(held, axis=1) - held).reshape(-1))
    most = score.shape[1]
    place = jnp.clip(jnp.arange(tokens) - first, 0, most - 1)
    index = jnp.maximum(segment - 1, 0) * most + place
    own = jnp.take_along_axis(score.reshape(rows, -1), index, axis=1)
    order = jnp.lexsort((own, jnp.where(segment > 0, segment, part.studies + 1)))
    rank = jnp.argsort(order, axis=1) - first
    return (segment > 0) & (rank < part.by_token(jnp.asarray(count)[held].reshape(-1)))


def part_of(part: PackedPart) -> Bool[Array, "row token"]:
    """Tokens that are not padding."""
    return jnp.ones(part.patches.shape[:2], bool) if part.segment is None else part.segment > 0


def rooms(tokens: int, studies: int, share: float) -> tuple[int, int]:
    """Tokens in which the patches that stay, and those hidden, of a row always have room."""
    if studies == 1:
        return tokens - hidden_of(tokens, share), hidden_of(tokens, share)
    # round(share n) is within a half of share n, and hiding at least one adds at most another half.
    stay, hide = math.ceil((1 - share) * tokens + studies / 2), math.floor(share * tokens + 1e-6) + studies
    return min(stay, tokens), min(hide, tokens)


def take(part: PackedPart, chosen: Bool[Array, "row token"], room: int) -> PackedPart:
    """The chosen tokens alone, in their order, in rows of `room` tokens."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :room]
    patches, centres = (jnp.take_along_axis(x, order[..., None], axis=1) for x in (part.patches, part.centres_mm))
    segment = None
    if part.segment is not None:
        segment = jnp.take_along_axis(jnp.where(chosen, part.segment, 0), order, axis=1)
    return PackedPart(patches, centres, segment, part.present)
