"""Which patches of an image masked modelling hides (MAE, arXiv:2111.06377): a share of each study's, at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from mmfm_jax.config.hiding import buffers, hidden_of
from mmfm_jax.data.batch import Array, PackedPart


def hide(part: PackedPart, share: float, most: int, keys: PRNGKeyArray) -> tuple[PackedPart, PackedPart]:
    """A part in two: the patches that stay, and those hidden, each in as few tokens as always suffice.

    `most`: patches of the largest image; `keys`: one a study [batch]. What is hidden of a study depends on its key and
    on the number of its patches, not on its neighbours.
    """
    score = jax.vmap(lambda key: jax.random.uniform(key, (most,)))(keys)
    hidden = lowest(part, score, np.array([hidden_of(n, share) for n in range(most + 1)]))
    tokens, whole = part.patches.shape[1], part.segment is None
    shown_tokens, hidden_tokens = buffers(tokens, None if whole else part.studies, share, most)
    return take(part, part_of(part) & ~hidden, shown_tokens), take(part, hidden, hidden_tokens)


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


def take(part: PackedPart, chosen: Bool[Array, "row token"], tokens: int) -> PackedPart:
    """The chosen tokens alone, in their order, in rows of `tokens` tokens."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :tokens]
    patches, centres = (jnp.take_along_axis(x, order[..., None], axis=1) for x in (part.patches, part.centres_mm))
    segment = None
    if part.segment is not None:
        segment = jnp.take_along_axis(jnp.where(chosen, part.segment, 0), order, axis=1)
    return PackedPart(patches, centres, segment, part.present)
